"""Settings of the builder of correction rows and of the studies; each is an option of a command."""

from dataclasses import dataclass
from pathlib import Path

from ..data.corrections import CHECK_PROMPT
from ..endpoint import EndpointSettings, completions_url
from ..errors import UserError
from ..settings import Checked, setting

MODES = ("repair", "refine")
KEEPS = ("repeat", "teacher")
GOLD, OWN = "gold", "own"  # teachers that are asked nothing


@dataclass(frozen=True)
class BuildConfig(EndpointSettings):
    """Settings of the builder; each is an option of `vlm-sft-rl data correct`."""

    mode: str = setting("repair", "repair: correct a model's attempts. refine: improve right answers.")
    teacher: str = setting(
        GOLD,
        "Who corrects: gold (a field of the question), own (with repair: right attempts), a checkpoint "
        "directory, or an endpoint.",
    )
    gold_field: str = setting("staged", "Field of the question that the teacher `gold` answers with.")
    keep: str = setting(
        "repeat", "With repair, after a right attempt: repeat it, or ask the teacher (teacher)."
    )
    teacher_model: str | None = setting(None, "Name of the teacher model at its endpoint.")
    model: str | None = setting(
        None, "With repair: checkpoint directory of the model whose attempts are corrected."
    )
    grader: str = setting("choice", "How conclusions are graded: choice, chartqa, pocket, …")
    samples: int = setting(4, "Attempts for each question.", least=1)
    temperature: float = setting(0.8, "Temperature of the attempts.", least=0)
    top_p: float | None = setting(
        0.95,
        "Sample attempts from the most likely tokens that reach this probability together.",
        above=0,
        most=1,
    )
    max_new_tokens: int = setting(512, "Longest answer, in tokens.", least=1)
    wrong_share: float = setting(0.5, "Share of the rows whose attempt is wrong.", least=0, most=1)
    per_question: int = setting(
        1, "Most right attempts, and most wrong ones, that are used of a question.", least=1
    )
    limit: int | None = setting(None, "Most rows to make. Default: all.", least=1)
    tries: int = setting(2, "Answers of the teacher that are tried; the first valid one is taken.", least=1)
    teacher_temperature: float = setting(0.7, "Temperature of the teacher.", least=0)
    prompt: str = setting(CHECK_PROMPT, "What the user turn before a correction asks.")
    ask: str = setting("{question}", "Prompt of the first attempt; {question} is filled in.")
    batch_size: int = setting(32, "Attempts decoded side by side.", least=1)
    seed: int = setting(0, "Seed of everything that is drawn at random.")

    def __post_init__(self):
        """Raises UserError: settings that do not exist, are out of range or do not go together."""
        super().__post_init__()
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
        if self.is_endpoint:
            completions_url(self.teacher)  # refused before any work
        if "{question}" not in self.ask:
            raise UserError(f"--ask must contain {{question}}, found {self.ask!r}.")

    @property
    def is_endpoint(self) -> bool:
        return self.teacher.startswith(("http://", "https://"))


@dataclass(frozen=True)
class StudyConfig(Checked):
    """What the studies of a model's answers to a question file share."""

    grader: str = setting("pocket", "How conclusions are graded: pocket, choice, chartqa, …")
    image_root: Path | None = setting(
        None, "Folder that image paths start from. Default: the folder of QUESTIONS."
    )
    limit: int | None = setting(None, "Answer only the first N questions. Default: all.", least=1)
    max_new_tokens: int = setting(512, "Longest draft, in tokens.", least=1)
    batch_size: int = setting(16, "Answers decoded side by side.", least=1)
    seed: int = setting(0, "Seed of everything that is drawn at random.")
