"""`CountMetric`: an `evaluate.Metric` that is a function of summed per-sample counts, and works offline."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np

from ..bootstrap import Interval, Statistic, bootstrap, paired


class CountMetric(evaluate.Metric):
    """Base of our metrics. Subclasses fill `columns`, `statistics`, `reference_field` and `sample_counts`.

    `compute(predictions=[…], references=[…])` is the ordinary `evaluate` call and gives plain numbers; `counts` and
    `intervals` give the per-sample counts and the numbers with bootstrap intervals. Nothing is fetched, and
    predictions stay in memory.
    """

    columns: ClassVar[tuple[str, ...]]
    statistics: ClassVar[Mapping[str, Statistic]]
    lower_is_better: ClassVar[frozenset[str]] = frozenset()
    reference_field: ClassVar[str]
    reference_feature: ClassVar[Any]

    def __init__(self, **kwargs):
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description="",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": self.reference_feature}
            ),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        totals = self.counts(predictions, references).sum(axis=0)
        return {name: float(statistic(totals)) for name, statistic in self.statistics.items()}

    def sample_counts(self, prediction: str, reference: Any) -> Sequence[float]:
        """Counts of one answer, in the order of `columns`.

        Raises:
            UserError: the reference cannot be used; the message says why.
        """
        raise NotImplementedError

    def grade(self, phrase: str, reference: Any) -> bool | None:
        """Is this phrase of an answer right (True), wrong (False), or outside what the metric judges (None)?"""
        raise NotImplementedError

    def marks(self, answer: str, reference: Any) -> list[tuple[int, int, bool]]:
        """Stretches of an answer that the metric judges: `(start, end, is right)` in order."""
        raise NotImplementedError

    def badness(self, counts: np.ndarray) -> tuple[float, ...]:
        """Sorts one sample's counts from best to worst, for the examples of a report."""
        raise NotImplementedError

    def counts(self, predictions: Sequence[str], references: Sequence[Any]) -> np.ndarray:
        """Per-sample counts, `(n, len(columns))`."""
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions but {len(references)} references")
        rows = [self.sample_counts(*pair) for pair in zip(predictions, references, strict=True)]
        return np.asarray(rows, dtype=np.float64).reshape(len(rows), len(self.columns))

    def intervals(
        self, counts: np.ndarray, rounds: int = 100, seed: int = 0, level: float = 0.95
    ) -> dict[str, Interval]:
        return {
            name: bootstrap(counts, statistic, rounds, seed, level)
            for name, statistic in self.statistics.items()
        }

    def differences(
        self,
        counts_a: np.ndarray,
        counts_b: np.ndarray,
        rounds: int = 100,
        seed: int = 0,
        level: float = 0.95,
    ) -> dict[str, Interval]:
        """Paired differences a - b of every statistic; row i of both belongs to the same question."""
        return {
            name: paired(counts_a, counts_b, statistic, rounds, seed, level)
            for name, statistic in self.statistics.items()
        }
