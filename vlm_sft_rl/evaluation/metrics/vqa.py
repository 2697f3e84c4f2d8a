"""Accuracy against several people's answers (VQA, arXiv 1505.00468, section 5), for VQAv2, OK-VQA and VizWiz."""

import re
from collections.abc import Sequence

import datasets
import numpy as np

from ...errors import UserError
from ...graders.text import final_answer
from ..bootstrap import ratio
from .counting import CountMetric

COLUMNS = ("score", "unreadable", "questions")
AGREEING = 3  # as many of the others must have said the same for the whole point

_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}
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
    agreeing = sum(answer == one for one in answers)
    return float(np.mean([min((agreeing - (answer == one)) / AGREEING, 1) for one in answers]))


def accuracy(totals: np.ndarray) -> np.ndarray:
    return ratio(totals[..., 0], totals[..., 2])


def unreadable(totals: np.ndarray) -> np.ndarray:
    return ratio(totals[..., 1], totals[..., 2])


class VqaAccuracy(CountMetric):
    """`vqa_accuracy` (VQA, arXiv 1505.00468, section 5) against the answers of ten people, and `unreadable`.

    `predictions` are whole outputs, `references` lists of what people answered. An output in which no answer is found (a
    paragraph without "Answer:") is wrong, and is also reported apart as `unreadable`.

    Raises:
        UserError: fewer than four answers, with which no output could have the whole point.
    """

    columns = COLUMNS
    statistics = {"vqa_accuracy": accuracy, "unreadable": unreadable}  # noqa: RUF012
    lower_is_better = frozenset({"unreadable"})
    reads_answers = True
    reference_fields = ("answers",)
    reference_feature = datasets.Sequence(datasets.Value("string"))

    def check(self, reference) -> None:
        texts = not isinstance(reference, str) and all(isinstance(one, str) for one in reference)
        if not texts or len(reference) <= AGREEING:
            raise UserError(
                f"expected a list of at least {AGREEING + 1} people's answers, found {reference!r:.80}."
            )

    def read(self, answer: str, reference) -> str | None:
        text = final_answer(answer)
        return None if text is None else normalise(text)

    def sample_counts(self, prediction: str, reference: Sequence[str]) -> tuple[float, ...]:
        key = self.read(prediction, reference)
        if key is None:
            return 0, 1, 1
        return soft_accuracy(key, [normalise(one) for one in reference]), 0, 1

    def badness(self, counts: np.ndarray) -> tuple[float, ...]:
        return (1 - counts[0], counts[1])

    def verdict(self, counts: np.ndarray) -> str:
        return "unreadable" if counts[1] else f"{counts[0]:.0%}"

    def truth_text(self, reference: Sequence[str]) -> str:
        said = sorted(set(reference), key=lambda one: (-list(reference).count(one), one))
        return ", ".join(f"{one} ({list(reference).count(one)})" for one in said)
