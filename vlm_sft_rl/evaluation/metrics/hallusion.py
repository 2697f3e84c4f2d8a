"""HallusionBench (arXiv 2310.14566): yes/no questions on figures and on altered copies of them."""

import datasets
import numpy as np

from ...errors import UserError
from ..bootstrap import ratio
from .counting import CountMetric
from .yes_no import parse_strict

COLUMNS = ("right", "questions", "figures_right", "figures", "pairs_right", "pairs", "unreadable")


def _share(one: int, other: int):
    return lambda totals: ratio(totals[..., one], totals[..., other])


class HallusionBench(CountMetric):
    """HallusionBench (arXiv 2310.14566), as fractions.

    `accuracy` (per question, aAcc), `figure_accuracy` (all questions on a figure, fAcc), `pair_accuracy` (one
    question right on every version of its figure, qAcc), `unreadable`.

    Answers are read as yes or no without a judge; the owners let GPT-4 compare answers with the truth, which this does
    not imitate. The unit of the bootstrap is a set: a figure with its altered versions and all questions on them.

    `predictions` are free text, `references` are `{"answer", "set", "figure", "question_key"}`.

    Raises:
        UserError: a truth that is neither yes nor no.
    """

    columns = COLUMNS
    statistics = {  # noqa: RUF012
        "accuracy": _share(0, 1),
        "figure_accuracy": _share(2, 3),
        "pair_accuracy": _share(4, 5),
        "unreadable": _share(6, 1),
    }
    lower_is_better = frozenset({"unreadable"})
    reads_answers = True
    reference_fields = ("answer", "set", "figure", "question_key")
    reference_feature = {name: datasets.Value("string") for name in reference_fields}  # noqa: RUF012

    def check(self, reference) -> None:
        if reference["answer"] not in ("yes", "no"):
            raise UserError(f'answer: expected "yes" or "no", found {reference["answer"]!r}.')

    def sample_counts(self, prediction: str, reference) -> tuple[int, ...]:
        said = parse_strict(prediction)
        return int(said == reference["answer"]), int(said is None)

    def group_of(self, reference):
        return reference["set"]

    def group_counts(self, rows: np.ndarray, references) -> list[float]:
        counts = [float(rows[:, 0].sum()), len(rows)]
        for field in ("figure", "question_key"):
            right: dict[str, bool] = {}
            for row, reference in zip(rows, references, strict=True):
                right[reference[field]] = right.get(reference[field], True) and bool(row[0])
            counts += [sum(right.values()), len(right)]
        return [*counts, float(rows[:, 1].sum())]

    def read(self, answer: str, reference) -> str | None:
        return parse_strict(answer)

    def grade(self, phrase: str, reference) -> bool | None:
        said = parse_strict(phrase)
        return None if said is None else said == reference["answer"]

    def marks(self, answer: str, reference) -> list[tuple[int, int, bool]]:
        right = self.grade(answer, reference)
        return [] if right is None else [(0, len(answer), right)]

    def badness(self, counts: np.ndarray) -> tuple[float, ...]:
        return (1 - counts[0], counts[1])

    def verdict(self, counts: np.ndarray) -> str:
        return "unreadable" if counts[1] else "right" if counts[0] else "wrong"

    def truth_text(self, reference) -> str:
        return reference["answer"]
