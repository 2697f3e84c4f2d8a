"""Settings of the builder of correction rows and of the studies; each is an option of a command."""

from dataclasses import dataclass, field
from pathlib import Path

from ..data.corrections import CHECK_PROMPT
from ..errors import UserError

MODES = ("repair", "refine")
KEEPS = ("repeat", "teacher")
GOLD, OWN = "gold", "own"  # teachers that are asked nothing


@dataclass(frozen=True)
class BuildConfig:
    """Settings of the builder; each is an option of `vlm-sft-rl data correct`."""

    mode: str = field(
        default="repair",
        metadata={"help": "repair: a model's own attempts; refine: right answers made better."},
    )
    teacher: str = field(
        default=GOLD,
        metadata={
            "help": "gold (a field of the question), own (repair: right attempts), a model folder or an endpoint."
        },
    )
    gold_field: str = field(
        default="staged", metadata={"help": "The field that the teacher `gold` answers with."}
    )
    keep: str = field(
        default="repeat",
        metadata={"help": "repair: after a right attempt repeat it, or let the teacher look again."},
    )
    teacher_model: str | None = field(default=None, metadata={"help": "The endpoint's name of the model."})
    model: str | None = field(
        default=None, metadata={"help": "repair: the model whose attempts are corrected."}
    )
    grader: str = field(
        default="choice", metadata={"help": "Who judges conclusions: choice, chartqa, pocket, …"}
    )
    samples: int = field(default=4, metadata={"help": "Attempts per question."})
    temperature: float = field(default=0.8, metadata={"help": "Of the attempts."})
    top_p: float | None = field(default=0.95, metadata={"help": "Of the attempts."})
    max_new_tokens: int = field(default=512, metadata={"help": "Longest answer."})
    wrong_share: float = field(default=0.5, metadata={"help": "Share of rows whose attempt is wrong."})
    per_question: int = field(
        default=1, metadata={"help": "Most right and most wrong attempts of a question."}
    )
    limit: int | None = field(default=None, metadata={"help": "At most this many rows."})
    tries: int = field(default=2, metadata={"help": "Answers of the teacher; the first valid one is taken."})
    teacher_temperature: float = field(default=0.7, metadata={"help": "Of the teacher's answers."})
    prompt: str = field(default=CHECK_PROMPT, metadata={"help": "What the user asks before a correction."})
    ask: str = field(default="{question}", metadata={"help": "How a question is put to the model."})
    input_price: float = field(default=0.0, metadata={"help": "Endpoint: per million tokens."})
    output_price: float = field(default=0.0, metadata={"help": "Endpoint: per million tokens."})
    budget: float | None = field(default=None, metadata={"help": "Endpoint: stop when so much is spent."})
    batch_size: int = field(default=32, metadata={"help": "Attempts decoded side by side."})
    seed: int = field(default=0, metadata={"help": "Seed of everything that is drawn."})

    def __post_init__(self):
        """Raises UserError: settings that do not exist or do not go together."""
        if self.mode not in MODES:
            raise UserError(f"--mode is {self.mode!r}, expected one of {', '.join(MODES)}.")
        if self.keep not in KEEPS:
            raise UserError(f"--keep is {self.keep!r}, expected one of {', '.join(KEEPS)}.")
        if self.mode == "repair" and not self.model:
            raise UserError("--mode repair corrects a model's own attempts: name it with --model.")
        if self.mode == "refine" and self.teacher == OWN:
            raise UserError(
                "--teacher own gives right attempts, which --mode refine has already. Choose another."
            )
        if self.is_endpoint and not self.teacher_model:
            raise UserError(
                "--teacher is an endpoint: say which of its models answers, with --teacher-model."
            )
        counts = ("samples", "max_new_tokens", "per_question", "tries", "batch_size")
        for name in (*counts, *(("limit",) if self.limit is not None else ())):
            if getattr(self, name) < 1:
                raise UserError(
                    f"--{name.replace('_', '-')} must be at least 1, found {getattr(self, name)}."
                )
        if not 0 <= self.wrong_share <= 1:
            raise UserError(f"--wrong-share must be between 0 and 1, found {self.wrong_share}.")
        if "{question}" not in self.ask:
            raise UserError(f"--ask must contain {{question}}, found {self.ask!r}.")

    @property
    def is_endpoint(self) -> bool:
        return self.teacher.startswith(("http://", "https://"))


@dataclass(frozen=True)
class StudyConfig:
    """What the studies of a model's answers to a question file share."""

    grader: str = field(
        default="pocket", metadata={"help": "Who judges conclusions: pocket, choice, chartqa, …"}
    )
    image_root: Path | None = field(
        default=None, metadata={"help": "Folder that image paths are relative to; default: the questions'."}
    )
    limit: int | None = field(default=None, metadata={"help": "Only the first questions."})
    max_new_tokens: int = field(default=512, metadata={"help": "Longest draft."})
    batch_size: int = field(default=16, metadata={"help": "Answers decoded side by side."})
    seed: int = field(default=0, metadata={"help": "Seed of everything that is drawn."})

    def __post_init__(self):
        """Raises UserError: a number below 1."""
        for name in ("max_new_tokens", "batch_size", *(("limit",) if self.limit is not None else ())):
            if getattr(self, name) < 1:
                raise UserError(
                    f"--{name.replace('_', '-')} must be at least 1, found {getattr(self, name)}."
                )
