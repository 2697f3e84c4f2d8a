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
        None, "Text file of nouns, one a line: find these instead of spaCy's noun phrases."
    )
    spacy_model: str | None = setting(None, "spaCy pipeline. [en_core_web_sm]")
    objects: str | Path | None = setting(
        None, "JSONL of what is in each image: image and objects, or region rows with category."
    )
    kinds: str = setting(",".join(KINDS), "Negatives by rule, comma-separated.")
    negatives: int = setting(1, "Negative rows for each row, at most.", least=1)
    places: bool = setting(True, "Phrases begin with the preposition of place before them.")
    processes: int = setting(1, "Processes that find noun phrases.", least=1)
    seed: int = setting(0, "Seed of everything that is drawn.")
    checker: str | None = setting(
        None, "Checkpoint directory or endpoint that says of each phrase whether it is there."
    )
    checker_model: str | None = setting(None, "The endpoint's name for the checker.")
    check_question: str = setting(
        CHECK_QUESTION,
        "What it is asked; {phrase} is filled in.",
        holds="{phrase}",
    )
    teacher: str | None = setting(None, "Address of an OpenAI-compatible endpoint that writes negatives.")
    teacher_model: str | None = setting(None, "Its name for the model.")
    teacher_images: bool = setting(True, "Send the images too.")
    image_root: str | Path | None = setting(None, "Folder of the images. [the folder of SOURCE]")

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
