"""Settings of tagging. Nothing heavy here: the command line's options are made from them."""

from dataclasses import dataclass, field
from pathlib import Path

from ...errors import UserError

KINDS = ("yes_no", "choice", "count", "colour", "attribute", "relation", "object")  # of negatives by rule


@dataclass(frozen=True)
class TagConfig:
    """Settings of `pipeline.tag`; each is an option of `vlm-sft-rl data tag`."""

    nouns: str | Path | None = field(
        default=None,
        metadata={"help": "Text file of nouns, one a line: find these instead of spaCy's noun phrases."},
    )
    spacy_model: str | None = field(default=None, metadata={"help": "spaCy pipeline. [en_core_web_sm]"})
    objects: str | Path | None = field(
        default=None,
        metadata={"help": "JSONL of what is in each image: image and objects, or region rows with category."},
    )
    kinds: str = field(default=",".join(KINDS), metadata={"help": "Negatives by rule, comma-separated."})
    negatives: int = field(default=1, metadata={"help": "Negative rows for each row, at most."})
    places: bool = field(
        default=True, metadata={"help": "Phrases begin with the preposition of place before them."}
    )
    processes: int = field(default=1, metadata={"help": "Processes that find noun phrases."})
    seed: int = field(default=0, metadata={"help": "Seed of everything that is drawn."})
    checker: str | None = field(
        default=None,
        metadata={"help": "Checkpoint directory or endpoint that says of each phrase whether it is there."},
    )
    checker_model: str | None = field(default=None, metadata={"help": "The endpoint's name for the checker."})
    check_question: str = field(
        default="Is there {phrase} in the image? Answer yes or no.",
        metadata={"help": "What it is asked; {phrase} is filled in."},
    )
    teacher: str | None = field(
        default=None, metadata={"help": "Address of an OpenAI-compatible endpoint that writes negatives."}
    )
    teacher_model: str | None = field(default=None, metadata={"help": "Its name for the model."})
    teacher_images: bool = field(default=True, metadata={"help": "Send the images too."})
    image_root: str | Path | None = field(
        default=None, metadata={"help": "Folder of the images. [the folder of SOURCE]"}
    )
    api_key_env: str | None = field(
        default=None, metadata={"help": "Environment variable with the API key. [OPENAI_API_KEY, if set]"}
    )
    concurrency: int = field(default=8, metadata={"help": "Requests in flight."})
    input_price: float = field(
        default=0.0, metadata={"help": "Per million prompt tokens, to count the cost."}
    )
    output_price: float = field(default=0.0, metadata={"help": "Per million completion tokens."})
    budget: float | None = field(default=None, metadata={"help": "Stop when this much is spent."})

    def check(self) -> None:
        """Raises UserError: settings that do not exist or do not go together."""
        if unknown := set(self.kind_list) - set(KINDS):
            raise UserError(
                f"Unknown kinds of negatives: {', '.join(sorted(unknown))}. Known are {', '.join(KINDS)}."
            )
        if min(self.negatives, self.processes) < 1:
            raise UserError("negatives and processes must be at least 1.")
        if (self.teacher is None) != (self.teacher_model is None):
            raise UserError(
                "--teacher and --teacher-model go together: an address, and the model's name there."
            )
        if self.checker is not None and "://" in self.checker and self.checker_model is None:
            raise UserError("--checker with an address needs --checker-model, the model's name there.")

    @property
    def kind_list(self) -> list[str]:
        return [kind.strip() for kind in self.kinds.split(",") if kind.strip()]
