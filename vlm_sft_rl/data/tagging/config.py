"""Settings of tagging. Nothing heavy here: the command line's options are made from them."""

from dataclasses import dataclass
from pathlib import Path

from ...endpoint import EndpointSettings, completions_url
from ...errors import UserError
from ...settings import setting

KINDS = ("yes_no", "choice", "count", "colour", "attribute", "relation", "object")  # of negatives by rule
CHECK_QUESTION = "Is there {phrase} in the image? Answer yes or no."


@dataclass(frozen=True)
class TagConfig(EndpointSettings):
    """Settings of `pipeline.tag`; each is an option of `vlm-sft-rl data tag`."""

    nouns: str | Path | None = setting(
        None, "Text file of nouns, one a line: tag these instead of the noun phrases that spaCy finds."
    )
    spacy_model: str | None = setting(
        None, "spaCy pipeline that finds noun phrases. Default: en_core_web_sm."
    )
    objects: str | Path | None = setting(
        None,
        "Ground truth (JSONL) of what is in each image: image and objects, or region rows with category.",
    )
    kinds: str = setting(",".join(KINDS), "Kinds of negatives that are made by rule, with commas.")
    negatives: int = setting(1, "Most negative rows made from one row.", least=1)
    places: bool = setting(
        True, "Include a preposition of place before a phrase ('on the table') in its tag."
    )
    processes: int = setting(1, "Processes that find noun phrases.", least=1)
    seed: int = setting(0, "Seed of everything that is drawn at random.")
    checker: str | None = setting(
        None, "Checkpoint directory or endpoint that is asked of each phrase whether it is in the image."
    )
    checker_model: str | None = setting(None, "Name of the checker model at its endpoint.")
    check_question: str = setting(
        CHECK_QUESTION,
        "Question to the checker; {phrase} is filled in.",
        holds="{phrase}",
    )
    teacher: str | None = setting(None, "Address of an OpenAI-compatible endpoint that writes negatives.")
    teacher_model: str | None = setting(None, "Name of the teacher model at its endpoint.")
    teacher_images: bool = setting(True, "Send the images to the teacher, too.")
    image_root: str | Path | None = setting(
        None, "Folder that image paths start from. Default: the folder of SOURCE."
    )

    def __post_init__(self):
        """Raises UserError: settings that do not exist, are out of range or do not go together."""
        super().__post_init__()
        if unknown := set(self.kind_list) - set(KINDS):
            raise UserError(
                f"Unknown kinds of negatives: {', '.join(sorted(unknown))}. Known are {', '.join(KINDS)}."
            )
        if (self.teacher is None) != (self.teacher_model is None):
            raise UserError(
                "--teacher and --teacher-model go together: an address, and the model's name there."
            )
        if self.checker is not None and "://" in self.checker and self.checker_model is None:
            raise UserError("--checker with an address needs --checker-model, the model's name there.")
        for address in (self.teacher, self.checker):
            if address is not None and (address is self.teacher or "://" in address):
                completions_url(address)  # refused before any work

    @property
    def kind_list(self) -> list[str]:
        return [kind.strip() for kind in self.kinds.split(",") if kind.strip()]
