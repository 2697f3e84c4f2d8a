"""Existence questions answered with yes or no (POPE, arXiv 2305.10355)."""

import re

import datasets
import numpy as np

from ...errors import UserError
from ..bootstrap import ratio
from .counting import CountMetric

COLUMNS = ("true_yes", "false_yes", "false_no", "true_no", "unparsed_yes", "unparsed_no")
RULES = ("ours", "released")


def parse_released(answer: str) -> str:
    """The released evaluators' rule: everything that does not say no is a yes, also an empty answer or a refusal.

    Looks at the text before the first full stop, without commas, split at single spaces; `No`, `not` and `no` make a
    no, in exactly this spelling.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"}.intersection(words) else "yes"


def parse_strict(answer: str) -> str | None:
    """`"yes"`, `"no"`, or None where the answer says neither or both.

    A leading yes or no decides; otherwise the first sentence must contain exactly one of the two as a word.
    """
    sentence = re.split(r"[.!?\n]", answer.strip(), maxsplit=1)[0]
    words = re.findall(r"[^\W_]+", sentence.lower())
    if words and words[0] in ("yes", "no"):
        return words[0]
    said = {"yes", "no"}.intersection(words)
    return said.pop() if len(said) == 1 else None


def one_hot(said: str | None, truth: str) -> tuple[int, ...]:
    """Counts of one answer, in the order of `COLUMNS`; `truth` is `"yes"` or `"no"`."""
    cell = {
        ("yes", "yes"): 0,
        ("yes", "no"): 1,
        ("no", "yes"): 2,
        ("no", "no"): 3,
        (None, "yes"): 4,
        (None, "no"): 5,
    }[said, truth]
    return tuple(int(index == cell) for index in range(len(COLUMNS)))


def precision(totals: np.ndarray) -> np.ndarray:
    return ratio(totals[..., 0], totals[..., 0] + totals[..., 1])


def recall(totals: np.ndarray) -> np.ndarray:
    return ratio(totals[..., 0], totals[..., 0] + totals[..., 2] + totals[..., 4])


def f1(totals: np.ndarray) -> np.ndarray:
    """Yes is the positive class; an unparsed answer to a yes question is a miss."""
    misses = totals[..., 2] + totals[..., 4]
    return ratio(2 * totals[..., 0], 2 * totals[..., 0] + totals[..., 1] + misses)


def accuracy(totals: np.ndarray) -> np.ndarray:
    return ratio(totals[..., 0] + totals[..., 3], totals.sum(axis=-1))


def yes_ratio(totals: np.ndarray) -> np.ndarray:
    return ratio(totals[..., 0] + totals[..., 1], totals.sum(axis=-1))


def unreadable(totals: np.ndarray) -> np.ndarray:
    return ratio(totals[..., 4] + totals[..., 5], totals.sum(axis=-1))


class YesNo(CountMetric):
    """Yes/no questions (POPE, arXiv 2305.10355), all as fractions.

    `f1`, `accuracy`, `precision`, `recall` (yes positive), `yes_ratio`, `unreadable`.

    `predictions` are free text, `references` `"yes"` or `"no"`. An answer that says neither is wrong, and is also
    reported apart as `unreadable`: a model that lost the answer format is not a model that cannot see.

    Args:
        rules: `"ours"`, or `"released"` for the parsing rule of the published POPE evaluations, which reads
            everything that is not a no as a yes (so `unreadable` is always 0).
    """

    columns = COLUMNS
    statistics = {  # noqa: RUF012
        "f1": f1,
        "accuracy": accuracy,
        "precision": precision,
        "recall": recall,
        "yes_ratio": yes_ratio,
        "unreadable": unreadable,
    }
    lower_is_better = frozenset({"unreadable"})
    reads_answers = True
    reference_fields = ("answer",)
    reference_feature = datasets.Value("string")

    def __init__(self, rules: str = "ours", **kwargs):
        super().__init__(**kwargs)
        if rules not in RULES:
            raise UserError(f"yes_no: rules is {rules!r}, expected one of {', '.join(RULES)}.")
        self.rules = rules

    def sample_counts(self, prediction: str, reference: str) -> tuple[int, ...]:
        truth = reference.strip().lower() if isinstance(reference, str) else reference
        if truth not in ("yes", "no"):
            raise UserError(
                f'expected "yes" or "no", found {reference!r} (YAML reads a bare yes as true: quote it).'
            )
        return one_hot(self.parse(prediction), truth)

    def parse(self, answer: str) -> str | None:
        return parse_released(answer) if self.rules == "released" else parse_strict(answer)

    def read(self, answer: str, reference: str) -> str | None:
        return parse_strict(answer)

    def grade(self, phrase: str, reference: str) -> bool | None:
        said = parse_strict(phrase)
        return None if said is None else said == reference.strip().lower()

    def marks(self, answer: str, reference: str) -> list[tuple[int, int, bool]]:
        right = self.grade(answer, reference)
        return [] if right is None else [(0, len(answer), right)]

    def badness(self, counts: np.ndarray) -> tuple[float, ...]:
        return (1 - counts[0] - counts[3], counts[4] + counts[5])

    def verdict(self, counts: np.ndarray) -> str:
        if counts[4] + counts[5]:
            return "unreadable"
        return "right" if counts[0] + counts[3] else "wrong"
