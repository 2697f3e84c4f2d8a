"""Correction rows from graded attempts and a teacher's answers, as pure functions.

*Refine* is what the released LLaVA-SCo pipeline does: a right staged answer, and a better one by a teacher that was told
it is right. *Repair* is what its description promises: the model's own attempts, wrong ones corrected and right ones kept.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..data.corrections import CHECK_PROMPT, Draft, correction_row
from ..data.stages import STAGES, conclusion, problems
from ..errors import UserError
from ..graders import Grader
from ..graders.grade import grade_staged

MODES = ("repair", "refine")
KEEPS = ("repeat", "teacher")
GOLD, OWN = "gold", "own"  # teachers that are asked nothing

FORM = " ".join(f"<{stage}> … </{stage}>" for stage in STAGES)
MEANING = (
    "SUMMARY: how you will go about it. CAPTION: what in the image matters for the question. REASONING: the steps. "
    "CONCLUSION: the final answer alone, for a choice its option."
)


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
class Attempt:
    """One answer of the model to a question: its text and grade status (`right`, `wrong`, `unreadable`)."""

    question: str
    index: int
    text: str
    status: str

    @property
    def right(self) -> bool:
        return self.status == "right"

    @property
    def place(self) -> tuple[str, int]:
        return self.question, self.index


def refine_prompt(question: str, attempt: str) -> str:
    """What a teacher is asked in refine mode."""
    return (
        f"Question: {question}\n\nAn answer to it, whose conclusion is right:\n{attempt}\n\nExamine this answer against the "
        "image. Write it anew and better: a sharper plan, a more exact and complete description of what matters in the "
        f"image, and above all sounder steps. Keep the conclusion. {_demand()}"
    )


def repair_prompt(question: str, attempt: str, answer: str) -> str:
    """What a teacher is asked in repair mode; it knows the true answer and must get there from the image."""
    return (
        f"Question: {question}\n\nAn answer to it, which is wrong:\n{attempt}\n\nThe right answer is: {answer}\n\nFind "
        "where the answer above leaves the image or the rules of sound reasoning, and write it anew from there, so that it "
        f"comes to the right answer by itself. Do not mention that you were told. {_demand()}"
    )


def _demand() -> str:
    return f"Reply with these four sections and nothing else: {FORM}\n{MEANING}"


def fault_of(text: str, grader: Grader | None, question: Mapping, *, equals: str | None = None) -> str | None:
    """Why a teacher's answer cannot be used, in a word or two; None when it can.

    Args:
        grader: its grade of the conclusion must be right (None: not asked).
        equals: the conclusion must be this one, but for case, blanks and a closing full stop.
    """
    if not text.strip():
        return "empty"
    if problems(text):
        return "not staged"
    if equals is not None and _plain(conclusion(text) or "") != _plain(equals):
        return "another conclusion"
    if grader is not None:
        status = grade_staged(grader, text, dict(question)).status
        if status != "right":
            return f"conclusion {status}"
    return None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .")


def choose_attempts(
    attempts: Sequence[Attempt],
    *,
    wrong_share: float,
    per_question: int = 2,
    limit: int | None = None,
    seed: int = 0,
) -> list[Attempt]:
    """The attempts to learn from: as many as can be had with this share of wrong ones, in a seeded order.

    Args:
        wrong_share: wrong ones of all, in [0, 1]. Answers without a readable conclusion count as wrong.
        per_question: the most of each sort (right, wrong) from one question; equal texts count once.
        limit: at most this many in all.

    Raises:
        UserError: a share outside of [0, 1], or one sort is needed and there is none.
    """
    if not 0 <= wrong_share <= 1:
        raise UserError(f"`wrong_share` must lie in [0, 1], found {wrong_share!r}.")
    pools: dict[bool, list[Attempt]] = {True: [], False: []}
    taken: Counter = Counter()
    seen: set[tuple[str, str]] = set()
    for attempt in sorted(attempts, key=lambda a: (a.question, a.index)):
        key, sort = (attempt.question, attempt.text.strip()), (attempt.question, attempt.right)
        if key in seen:
            continue
        seen.add(key)
        if taken[sort] >= per_question:
            continue
        taken[sort] += 1
        pools[attempt.right].append(attempt)
    rng = random.Random(f"{seed}-attempts")
    for right in (False, True):
        rng.shuffle(pools[right])
    shares = {False: wrong_share, True: 1 - wrong_share}
    for right, share in shares.items():
        if share > 0 and not pools[right]:
            name = "right" if right else "wrong"
            raise UserError(
                f"There is no {name} attempt among {len(attempts)}, but `wrong_share: {wrong_share:g}` needs some. Draw "
                "more samples, change the temperature, or change the share."
            )
    total = min(len(pools[right]) / share for right, share in shares.items() if share > 0)
    total = total if limit is None else min(total, limit)
    # a hair more, because 0.7 * 10 / 0.7 is a little less than 10
    chosen = [a for right, share in shares.items() for a in pools[right][: int(total * share + 1e-6)]]
    rng.shuffle(chosen)
    return chosen


def repair_rows(
    chosen: Sequence[Attempt],
    questions: Mapping[str, dict],
    corrections: Mapping[tuple[str, int], str],
    prompt: str = CHECK_PROMPT,
    ask: str = "{question}",
    keep: str = "repeat",
) -> list[dict]:
    """Rows of chosen attempts: a wrong one is followed by its correction, a right one by itself.

    Args:
        keep: `teacher`: a right one is followed by its correction too.
        corrections: (question id, attempt index) -> valid correction; wrong attempts without one are left out.
        ask: how the first question is put.
    """
    rows = []
    for attempt in chosen:
        question = questions[attempt.question]
        target = attempt.text if attempt.right and keep == "repeat" else corrections.get(attempt.place)
        if target is not None:
            drafts = [Draft(attempt.text.strip(), attempt.right), Draft(target.strip(), True)]
            rows.append(_row(question, attempt.index, drafts, prompt, ask))
    return rows


def refine_rows(
    answers: Sequence[tuple[dict, str, str]], prompt: str = CHECK_PROMPT, ask: str = "{question}"
) -> list[dict]:
    """Rows of (question, right staged answer, refined answer)."""
    return [
        _row(question, 0, [Draft(first.strip(), True), Draft(second.strip(), True)], prompt, ask)
        for question, first, second in answers
    ]


def _row(question: dict, index: int, drafts: list[Draft], prompt: str, ask: str) -> dict:
    text = ask.replace("{question}", question["question"])
    return correction_row(f"{question['id']}/{index}", question["images"], text, drafts, prompt)
