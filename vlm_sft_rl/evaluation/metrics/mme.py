"""MME (arXiv 2306.13394): two yes/no questions a picture, scored by picture and added up over categories."""

from collections.abc import Sequence

import datasets
import numpy as np

from ...errors import UserError
from ..bootstrap import ratio
from .counting import CountMetric
from .yes_no import RULES, parse_strict

HALLUCINATION = ("existence", "count", "position", "color")
PERCEPTION = (*HALLUCINATION, "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
CATEGORIES = (*PERCEPTION, *COGNITION)
_PICTURES = len(CATEGORIES)
_REST = 2 * len(CATEGORIES)
COLUMNS = (
    *(f"score_{name}" for name in CATEGORIES),
    *(f"pictures_{name}" for name in CATEGORIES),
    "right",
    "questions",
    "pictures_right",
    "unreadable",
)


def parse_released(answer: str) -> str | None:
    """The released rule: the whole answer, else its first four characters, lower-cased; "yes" is looked for first."""
    text = answer.strip().lower()
    if text in ("yes", "no"):
        return text
    return next((word for word in ("yes", "no") if word in text[:4]), None)


def _points(names: Sequence[str]):
    chosen = [CATEGORIES.index(name) for name in names]

    def points(totals: np.ndarray) -> np.ndarray:
        scores = totals[..., chosen]
        return ratio(scores, totals[..., [index + _PICTURES for index in chosen]]).sum(axis=-1)

    return points


def accuracy(totals: np.ndarray) -> np.ndarray:
    return ratio(totals[..., _REST], totals[..., _REST + 1])


def accuracy_plus(totals: np.ndarray) -> np.ndarray:
    return ratio(totals[..., _REST + 2], totals[..., _PICTURES:_REST].sum(axis=-1))


def unreadable(totals: np.ndarray) -> np.ndarray:
    return ratio(totals[..., _REST + 3], totals[..., _REST + 1])


class Mme(CountMetric):
    """MME (arXiv 2306.13394, section 2.3), in its points.

    `perception` (up to 2000 points) and `cognition` (up to 800), `accuracy`, `accuracy_plus`, `unreadable`.

    A picture scores 100 * (share of its questions right + 1 if all are right); a category is the mean over its
    pictures, at most 200; a total is the sum over its categories. The unit of the bootstrap is the picture, drawn from
    all categories together (the released one draws in each category by itself, unseeded, and prints the mean of
    the draws). A picture whose questions are cut apart by `--limit` is scored on those that are left.

    `references` are `{"answer", "category", "pair"}`; `pair` names the picture within its category.

    Args:
        rules: `"released"` reads answers by their first four characters (`parse_released`).

    Raises:
        UserError: a category that is none of MME's, or a truth that is neither yes nor no.
    """

    columns = COLUMNS
    statistics = {  # noqa: RUF012
        "perception": _points(PERCEPTION),
        "cognition": _points(COGNITION),
        "accuracy": accuracy,
        "accuracy_plus": accuracy_plus,
        "unreadable": unreadable,
    }
    lower_is_better = frozenset({"unreadable"})
    reads_answers = True
    not_fractions = frozenset({"perception", "cognition", "hallucination"})
    reference_fields = ("answer", "category", "pair")
    reference_feature = {name: datasets.Value("string") for name in reference_fields}  # noqa: RUF012

    def __init__(self, rules: str = "ours", **kwargs):
        super().__init__(**kwargs)
        if rules not in RULES:
            raise UserError(f"mme: rules is {rules!r}, expected one of {', '.join(RULES)}.")
        self.rules = rules

    def check(self, reference) -> None:
        if reference["category"] not in CATEGORIES:
            raise UserError(f"category {reference['category']!r} is none of MME's: {', '.join(CATEGORIES)}.")
        if str(reference["answer"]).strip().lower() not in ("yes", "no"):
            raise UserError(f'answer: expected "Yes" or "No", found {reference["answer"]!r}.')

    def sample_counts(self, prediction: str, reference) -> tuple[int, ...]:
        said = parse_released(prediction) if self.rules == "released" else parse_strict(prediction)
        return int(said == reference["answer"].strip().lower()), int(said is None)

    def group_of(self, reference):
        return reference["category"], reference["pair"]

    def group_counts(self, rows: np.ndarray, references) -> list[float]:
        right, total = float(rows[:, 0].sum()), len(rows)
        counts = [0.0] * len(COLUMNS)
        index = CATEGORIES.index(references[0]["category"])
        counts[index] = 100 * (right / total + (right == total))
        counts[index + _PICTURES] = 1
        counts[_REST:] = [right, total, float(right == total), float(rows[:, 1].sum())]
        return counts

    def read(self, answer: str, reference) -> str | None:
        return parse_strict(answer)

    def grade(self, phrase: str, reference) -> bool | None:
        said = parse_strict(phrase)
        return None if said is None else said == reference["answer"].strip().lower()

    def marks(self, answer: str, reference) -> list[tuple[int, int, bool]]:
        right = self.grade(answer, reference)
        return [] if right is None else [(0, len(answer), right)]

    def badness(self, counts: np.ndarray) -> tuple[float, ...]:
        return (1 - counts[0], counts[1])

    def verdict(self, counts: np.ndarray) -> str:
        return "unreadable" if counts[1] else "right" if counts[0] else "wrong"

    def truth_text(self, reference) -> str:
        return reference["answer"]


class MmeHall(Mme):
    """As `Mme`, for its four categories on hallucination (arXiv 2504.13169): existence, count, position, color.

    `hallucination` is their sum, at most 800 points.
    """

    statistics = {  # noqa: RUF012
        "hallucination": _points(HALLUCINATION),
        "accuracy": accuracy,
        "accuracy_plus": accuracy_plus,
        "unreadable": unreadable,
    }
