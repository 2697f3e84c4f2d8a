"""The frame of all metrics: an `evaluate.Metric` is a pure function of one answer, and formulas over its summed counts."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np

from ...errors import UserError
from ..bootstrap import Interval, Statistic, differences, intervals

TEXT = datasets.Value("string")
TEXTS = datasets.Sequence(TEXT)
# `evaluate` refuses None for a string, but not for a large one
OPTIONAL_TEXT = datasets.Value("large_string")


class CountMetric(evaluate.Metric):
    """Base of our metrics. Subclasses fill `columns`, `statistics` and `reference_fields`, and write `sample_counts`.

    `compute(predictions=[…], references=[…])` is the ordinary `evaluate` call and gives plain numbers; `counts` and
    `intervals` give the per-sample counts and the numbers with bootstrap intervals. Nothing is fetched, and
    predictions stay in memory.

    A reference is the value of the row's one reference field, or, where a metric needs several, a map of them.
    Metrics whose unit is a group of questions (two about one picture, all rotations of one question) say which in
    `group_of`; then a row of `counts` is a group, and so is a unit of the bootstrap.

    Attributes:
        columns: names of the summed counts.
        sample_columns: what `sample_counts` gives, where `group_counts` makes other columns of it.
        statistics: name -> function of summed counts.
        reference_fields: fields of a question row that the metric needs, with their types.
        optional_fields: fields that are handed over where a row has them, else as None.
        prediction_field: what of a sample is scored: its `answer`, `located` for metrics about boxes, or its `judgement`
            for metrics with a judge.
        prediction_feature: its type.
        file_options: options of the constructor that are files of the benchmark's owners.
        reads_answers: whether `read` finds one short answer in a text.
        lower_is_better: statistics of which less is better.
        neither_is_better: statistics that describe the answers, whatever they are worth.
        not_fractions: statistics that are no shares between 0 and 1 (points, words).
        averages_categories: whether the owners' figure for everything is the mean of the categories' figures.
    """

    columns: ClassVar[tuple[str, ...]]
    sample_columns: ClassVar[tuple[str, ...]] = ()
    statistics: ClassVar[Mapping[str, Statistic]]
    lower_is_better: ClassVar[frozenset[str]] = frozenset()
    neither_is_better: ClassVar[frozenset[str]] = frozenset({"length", "words", "yes_ratio"})
    not_fractions: ClassVar[frozenset[str]] = frozenset()
    reference_fields: ClassVar[datasets.Features]
    optional_fields: ClassVar[datasets.Features] = datasets.Features()
    prediction_field: ClassVar[str] = "answer"
    prediction_feature: ClassVar[Any] = TEXT
    file_options: ClassVar[frozenset[str]] = frozenset()
    reads_answers: ClassVar[bool] = False
    averages_categories: ClassVar[bool] = False

    def __init__(self, **kwargs):
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        fields = {**self.reference_fields, **self.optional_fields}
        reference = next(iter(fields.values())) if len(fields) == 1 else fields
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description="",
            features=datasets.Features({"predictions": self.prediction_feature, "references": reference}),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        totals = self.counts(predictions, references).sum(axis=0)
        return {name: float(statistic(totals)) for name, statistic in self.statistics.items()}

    def reference_of(self, row: Mapping[str, Any]) -> Any:
        """The reference in a question row or in a sample's `reference`.

        Raises UserError: a field is missing.
        """
        for name in self.reference_fields:
            if name not in row:
                raise UserError(f"its reference has no {name!r}, which this metric needs.")
        fields = [*self.reference_fields, *self.optional_fields]
        return row[fields[0]] if len(fields) == 1 else {name: row.get(name) for name in fields}

    def prediction_of(self, sample: Mapping[str, Any]) -> Any:
        """What of a sample is scored."""
        return sample.get(self.prediction_field) or ""

    def asks_judge(self, answer: str) -> bool:
        """Whether the judge is asked about this answer, for metrics with a judge."""
        return True

    def check(self, reference: Any) -> None:
        """Raises UserError: the reference cannot be used."""
        self.sample_counts("", reference)

    def sample_counts(self, prediction: str, reference: Any) -> Sequence[float]:
        """Counts of one answer, in the order of `sample_columns`, or of `columns` where there are no others.

        Raises UserError: the reference cannot be used; the message says why.
        """
        raise NotImplementedError

    def read(self, answer: str, reference: Any) -> str | None:
        """Normal form of what is answered, the same for answers that mean the same; None where nothing can be read.
        Never looks at the true answer. For metrics with `reads_answers`."""
        raise NotImplementedError

    def grade(self, phrase: str, reference: Any) -> bool | None:
        """Is this phrase of an answer right (True), wrong (False), or outside what the metric judges (None)?"""
        return None

    def marks(self, answer: str, reference: Any) -> list[tuple[int, int, bool]]:
        """Stretches of an answer that the metric judges: `(start, end, is right)` in order."""
        return []

    def missed(self, answer: str, reference: Any) -> list[str]:
        """What the answer should have named and did not, for metrics that look for it."""
        return []

    def badness(self, counts: np.ndarray) -> tuple[float, ...]:
        """Sorts one sample's counts from best to worst, for the examples of a report."""
        raise NotImplementedError

    def verdict(self, counts: np.ndarray) -> str:
        """One word about one answer for tables and filters: `right`, `wrong`, `unreadable`, or the metric's own."""
        raise NotImplementedError

    def truth_text(self, reference: Any) -> str:
        """The reference as a reader wants to see it beside an answer."""
        truth = reference["answer"] if isinstance(reference, Mapping) else reference
        return truth if isinstance(truth, str) else ", ".join(map(str, truth))

    def group_of(self, reference: Any) -> Hashable:
        """Key of the group that a question belongs to; None: every question stands for itself."""
        return None

    def group_counts(self, rows: np.ndarray, references: Sequence[Any]) -> Sequence[float]:
        """`columns` of one group from its questions' `sample_counts`."""
        return rows.sum(axis=0)

    def per_sample(self, predictions: Sequence[str], references: Sequence[Any]) -> np.ndarray:
        """`sample_counts` of every answer, `(n, k)`."""
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions but {len(references)} references")
        rows = [self.sample_counts(*pair) for pair in zip(predictions, references, strict=True)]
        width = len(rows[0]) if rows else len(self.columns)
        return np.asarray(rows, dtype=np.float64).reshape(len(rows), width)

    def counts(self, predictions: Sequence[str], references: Sequence[Any]) -> np.ndarray:
        """Counts of every unit of the bootstrap, `(units, len(columns))`: an answer, or a group of them."""
        rows = self.per_sample(predictions, references)
        groups: dict[Hashable, list[int]] = {}
        for index, reference in enumerate(references):
            groups.setdefault(self.group_of(reference), []).append(index)
        if set(groups) <= {None}:
            return rows
        units = [self.group_counts(rows[group], [references[i] for i in group]) for group in groups.values()]
        return np.asarray(units, dtype=np.float64).reshape(len(units), len(self.columns))

    def intervals(
        self, counts: np.ndarray, rounds: int = 100, seed: int = 0, level: float = 0.95
    ) -> dict[str, Interval]:
        """Every statistic with its bootstrap interval."""
        return intervals(counts, self.statistics, rounds, seed, level)

    def differences(
        self,
        counts_a: np.ndarray,
        counts_b: np.ndarray,
        rounds: int = 100,
        seed: int = 0,
        level: float = 0.95,
    ) -> dict[str, Interval]:
        """Paired differences a - b of every statistic; row i of both belongs to the same question or group."""
        return differences(counts_a, counts_b, self.statistics, rounds, seed, level)


class AnswerMetric(CountMetric):
    """Base of metrics that read one short answer in a text: it is right, wrong or unreadable.

    Among the columns of one answer are `right` (or its score) and `unreadable`, or `outcome` says how to make them.
    """

    lower_is_better = frozenset({"unreadable"})
    reads_answers = True

    def outcome(self, counts: np.ndarray) -> tuple[float, float]:
        """Score of one answer, and whether it was unreadable."""
        columns = self.sample_columns or self.columns
        return counts[columns.index("right")], counts[columns.index("unreadable")]

    def badness(self, counts: np.ndarray) -> tuple[float, ...]:
        score, unreadable = self.outcome(counts)
        return (1 - score, unreadable)

    def verdict(self, counts: np.ndarray) -> str:
        score, unreadable = self.outcome(counts)
        return "unreadable" if unreadable else "right" if score else "wrong"
