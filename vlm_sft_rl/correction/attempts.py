"""Correction rows from graded attempts and a teacher's answers, as pure functions.

*Refine* is what the released LLaVA-SCo pipeline does: a right staged answer, and a better one by a teacher that was told
it is right. *Repair* is what its description promises: the model's own attempts, wrong ones corrected and right ones kept.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..data.conclusions import conclusion, folded
from ..data.corrections import CHECK_PROMPT, Draft, correction_row
from ..data.rows import question_text
from ..data.stages import STAGES, problems
from ..errors import UserError
from ..graders import Grader
from ..graders.grade import grade_staged

FORM = " ".join(f"<{stage}> … </{stage}>" for stage in STAGES)
MEANING = (
    "SUMMARY: how you will go about it. CAPTION: what in the image matters for the question. REASONING: the steps. "
    "CONCLUSION: the final answer alone, for a choice its option."
)


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
    if equals is not None and folded(conclusion(text).text) != folded(equals):
        return "another conclusion"
    if grader is not None:
        status = grade_staged(grader, text, dict(question)).status
        if status != "right":
            return f"conclusion {status}"
    return None


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

    Raises UserError: a share outside of [0, 1], or one sort is needed and there is none.
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
    text = ask.replace("{question}", question_text(question))
    return correction_row(f"{question['id']}/{index}", question["images"], text, drafts, prompt)
