"""Short answers: right or wrong by a grader, or by how many of several people gave the same."""

import re
from collections.abc import Mapping, Sequence

import datasets
import numpy as np

from ...errors import UserError, short
from ...graders import UNREADABLE, load_grader
from ...graders.text import DIGITS, final_answer
from ..bootstrap import ratio, statistics_of
from .counting import OPTIONAL_TEXT, TEXT, TEXTS, AnswerMetric


class AnswerAccuracy(AnswerMetric):
    """`accuracy`, and apart from it `unreadable`: outputs in which no answer could be read. Those are wrong, too.

    `predictions` are whole outputs; `references` are `{"answer", "choices", "unit", "precision", "answer_type",
    "circle"}`, all of them text but `choices`, a list; all but the answer may be None where the grader needs them not.

    Args:
        grader: a name of `vlm_sft_rl.graders.GRADERS`.
        rules: `"ours"`, or `"released"` for the rules of the released evaluators (see the grader's docstring).
        circular: the rows are rotations of multiple-choice questions; one counts as right only where all rotations
            (rows of one `circle`) are (MMBench, arXiv 2307.06281). The unit of the bootstrap is the question then.
    """

    columns = ("right", "units", "unreadable", "questions")
    statistics = statistics_of(
        columns,
        accuracy=lambda t: ratio(t.right, t.units),
        unreadable=lambda t: ratio(t.unreadable, t.questions),
    )
    reference_fields = datasets.Features(answer=TEXT)
    optional_fields = datasets.Features(
        choices=TEXTS,
        unit=OPTIONAL_TEXT,
        precision=OPTIONAL_TEXT,
        answer_type=OPTIONAL_TEXT,
        circle=OPTIONAL_TEXT,
    )

    def __init__(self, grader: str, rules: str = "ours", circular: bool = False, **kwargs):
        super().__init__(**kwargs)
        self._grade, self._our_grade = load_grader(grader, rules), load_grader(grader)
        self.circular = circular

    def check(self, reference: Mapping) -> None:
        if self.circular and not reference.get("circle"):
            raise UserError("'circle' is missing, which `circular: true` groups rotations by.")
        self._grade("Answer: A", reference)

    def read(self, answer: str, reference: Mapping) -> str | None:
        # always by our rules: a released one gives the true answer away where it reads none
        return self._our_grade(answer, reference).key

    def sample_counts(self, prediction: str, reference: Mapping) -> tuple[int, ...]:
        grade = self._grade(prediction, reference)
        return int(grade.correct), 1, int(grade.status == UNREADABLE), 1

    def group_of(self, reference: Mapping) -> str | None:
        return reference["circle"] if self.circular else None

    def group_counts(self, rows: np.ndarray, references: Sequence[Mapping]) -> list[float]:
        return [float(rows[:, 0].all()), 1, float(rows[:, 2].sum()), len(rows)]

    def grade(self, phrase: str, reference: Mapping) -> bool | None:
        grade = self._grade(phrase, reference)
        return None if grade.status == UNREADABLE else grade.correct

    def marks(self, answer: str, reference: Mapping) -> list[tuple[int, int, bool]]:
        """Where the answer that was read stands: its last occurrence, or nowhere if it was rewritten."""
        grade = self._grade(answer, reference)
        at = answer.rfind(grade.answer) if grade.answer else -1
        return [] if at < 0 else [(at, at + len(grade.answer), grade.correct)]

    def truth_text(self, reference: Mapping) -> str:
        answer, choices = reference["answer"], reference.get("choices")
        at = ord(answer) - ord("A") if len(answer) == 1 else -1
        return f"{answer}: {choices[at]}" if choices and 0 <= at < len(choices) else answer


AGREEING = 3  # as many of the others must have given the same answer for the whole point
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(DIGITS)}
_ARTICLES = {"a", "an", "the"}
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_DOT = re.compile(r"\.(?!\d)")
# words that people write without their apostrophe; those that are words without it (we'll, she'd) are left alone
_SHORT = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's i'd've isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't "
    "must've needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't "
    "what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're "
    "why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
)
_APOSTROPHES = {
    word[: match.start()] + word[match.end() :]: word
    for word in _SHORT.split()
    for match in re.finditer("'", word)
}


def normalise(text: str) -> str:
    """An answer as these benchmarks compare it: lower case, numbers up to ten as digits, no articles, no punctuation (but
    apostrophes, and dots before a digit), apostrophes of short forms put back. On people's answers and on the model's; the
    owners' programs leave some of it out on one side or the other, from version to version."""
    text = " ".join(text.split())
    joined = _COMMA_IN_NUMBER.search(text) is not None
    # a mark at the edge of a word goes; between two words it parts them
    edges = {mark for mark in _MARKS if joined or f"{mark} " in text or f" {mark}" in text}
    text = text.translate({ord(mark): "" if mark in edges else " " for mark in _MARKS})
    words = [_NUMBERS.get(word, word) for word in _DOT.sub("", text).lower().split()]
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def soft_accuracy(answer: str, answers: Sequence[str]) -> float:
    """min(agreeing / 3, 1), the mean over leaving out each of `answers` once (arXiv 1505.00468, footnote of section 5)."""
    agreeing = sum(answer == other for other in answers)
    return float(np.mean([min((agreeing - (answer == other)) / AGREEING, 1) for other in answers]))


class VqaAccuracy(AnswerMetric):
    """`vqa_accuracy` (VQA, arXiv 1505.00468, section 5) against the answers of ten people, and `unreadable`.

    `predictions` are whole outputs, `references` lists of what people answered (VQAv2, OK-VQA, VizWiz). An output in
    which no answer is found (a paragraph without "Answer:") is wrong, and is also reported apart as `unreadable`.
    """

    columns = ("right", "unreadable", "questions")
    statistics = statistics_of(
        columns,
        vqa_accuracy=lambda t: ratio(t.right, t.questions),
        unreadable=lambda t: ratio(t.unreadable, t.questions),
    )
    reference_fields = datasets.Features(answers=TEXTS)

    def check(self, reference: Sequence[str]) -> None:
        texts = not isinstance(reference, str) and all(isinstance(answer, str) for answer in reference)
        if not texts or len(reference) <= AGREEING:
            raise UserError(
                f"expected a list of at least {AGREEING + 1} people's answers, found {short(reference)}."
            )

    def read(self, answer: str, reference: Sequence[str]) -> str | None:
        text = final_answer(answer)
        return None if text is None else normalise(text)

    def sample_counts(self, prediction: str, reference: Sequence[str]) -> tuple[float, ...]:
        key = self.read(prediction, reference)
        if key is None:
            return 0, 1, 1
        return soft_accuracy(key, [normalise(answer) for answer in reference]), 0, 1

    def verdict(self, counts: np.ndarray) -> str:
        return "unreadable" if counts[1] else f"{counts[0]:.0%}"

    def truth_text(self, reference: Sequence[str]) -> str:
        votes = {answer: list(reference).count(answer) for answer in reference}
        ranked = sorted(votes, key=lambda answer: (-votes[answer], answer))
        return ", ".join(f"{answer} ({votes[answer]})" for answer in ranked)
