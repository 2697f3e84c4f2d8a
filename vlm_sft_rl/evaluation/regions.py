"""Figures of describe-then-locate samples: self-consistency, REC and REG, each with its bootstrap interval.

A sample is one box: {"id", "image", "box", "description", "located", "leak", "expression"?, "found"?, "exact"?}, boxes
(x1, y1, x2, y2) in pixels or None where no box could be read.
"""

from collections.abc import Sequence

import numpy as np

from ..rewards.boxes import iou
from .bootstrap import Interval, Statistic, bootstrap, paired, ratio

COLUMNS = ("boxes", "iou", "hits", "parsed", "leaks", "words", "asked", "found", "graded", "exact")


def sample_counts(sample: dict) -> tuple[float, ...]:
    """One box in the order of `COLUMNS`."""
    overlap = iou(sample["located"], sample["box"])
    asked = bool(sample.get("expression"))
    graded = sample.get("exact") is not None
    return (
        1,
        overlap,
        overlap >= 0.5,
        sample["located"] is not None,
        sample["leak"],
        len(sample["description"].split()),
        asked,
        asked and iou(sample.get("found"), sample["box"]) >= 0.5,
        graded,
        bool(graded and sample["exact"]),
    )


def _per(numerator: str, denominator: str) -> Statistic:
    top, bottom = COLUMNS.index(numerator), COLUMNS.index(denominator)
    return lambda totals: ratio(totals[..., top], totals[..., bottom])


STATISTICS: dict[str, Statistic] = {
    "self_consistency_iou": _per("iou", "boxes"),
    "self_consistency_acc50": _per("hits", "boxes"),
    "parse_rate": _per("parsed", "boxes"),
    "leak_rate": _per("leaks", "boxes"),
    "words": _per("words", "boxes"),
    "rec_acc50": _per("found", "asked"),
    "reg_exact": _per("exact", "graded"),
}
LOWER_IS_BETTER = frozenset({"leak_rate"})


def by_image(samples: Sequence[dict]) -> np.ndarray:
    """Counts (images, columns): boxes of one image are not independent, so whole images are resampled."""
    groups: dict[str, list[tuple[float, ...]]] = {}
    for sample in samples:
        groups.setdefault(sample["image"], []).append(sample_counts(sample))
    return np.array([np.sum(rows, axis=0) for rows in groups.values()], dtype=float)


def region_metrics(samples: Sequence[dict], rounds: int = 1000, seed: int = 0) -> dict[str, Interval]:
    """Every statistic that the samples have the fields for."""
    counts = by_image(samples)
    return {name: bootstrap(counts, statistic, rounds, seed) for name, statistic in _present(counts).items()}


def region_differences(
    ours: Sequence[dict], theirs: Sequence[dict], rounds: int = 1000, seed: int = 0
) -> dict[str, Interval]:
    """Paired differences of two runs over the same boxes in the same order.

    Raises:
        ValueError: the boxes differ.
    """
    if [s["id"] for s in ours] != [s["id"] for s in theirs]:
        raise ValueError("the two runs are not over the same boxes")
    one, other = by_image(ours), by_image(theirs)
    return {name: paired(one, other, statistic, rounds, seed) for name, statistic in _present(one).items()}


def _present(counts: np.ndarray) -> dict[str, Statistic]:
    totals = dict(zip(COLUMNS, counts.sum(axis=0), strict=True))
    absent = {"rec_acc50"} if not totals["asked"] else set()
    absent |= {"reg_exact"} if not totals["graded"] else set()
    return {name: statistic for name, statistic in STATISTICS.items() if name not in absent}
