"""What a threshold buys and costs: the metric over a range of tau, from one greedy run or from one run per tau."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..io import read_json
from .bootstrap import Interval
from .metrics.counting import CountMetric
from .revisions import derive
from .scoring import count_matrix


@dataclass(frozen=True)
class SweepPoint:
    """All metrics of one system at one threshold (None: a system without one)."""

    threshold: float | None
    metrics: dict[str, Interval]


def sweep(
    samples: Sequence[dict],
    metric: CountMetric,
    mode: str,
    thresholds: Sequence[float],
    *,
    rounds: int = 100,
    seed: int = 0,
) -> list[SweepPoint]:
    """`drop` or `stop` at every threshold, derived from the samples of one greedy run; nothing is generated."""
    points = []
    for tau in thresholds:
        counts = count_matrix([derive(sample, mode, tau) for sample in samples], metric)
        points.append(SweepPoint(float(tau), metric.intervals(counts, rounds, seed)))
    return points


def run_point(folder: str | Path) -> SweepPoint:
    """The point of a finished run, from its summary.json."""
    summary = read_json(Path(folder) / "summary.json")
    return SweepPoint(
        summary["threshold"], {name: Interval(**value) for name, value in summary["metrics"].items()}
    )


def useful_thresholds(samples: Sequence[dict], count: int = 9) -> list[float]:
    """Thresholds spread evenly over the ranks of the P(</UN>) that occur, so that every step changes something."""
    scores = sorted({span["p_unconfident"] for sample in samples for span in sample["spans"]})
    scores = [score for score in scores if 0 < score < 1]
    if len(scores) <= count:
        return scores
    return [scores[int(index)] for index in np.linspace(0, len(scores) - 1, count)]
