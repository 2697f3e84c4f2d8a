"""Percentile bootstrap over samples, for every statistic that is a function of summed per-sample counts.

A metric hands over a matrix of counts, one row per sample. A resample is then a vector of multiplicities, and all
resampled totals are one matrix product, so a thousand rounds over ten thousand samples take a fraction of a second.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import numpy as np

# (…, columns) summed counts -> (…) values
Statistic = Callable[[np.ndarray], np.ndarray]

CELLS_AT_ONCE = 4_000_000  # multiplicities held in memory at a time: 32 MB


@dataclass(frozen=True)
class Interval:
    """A point estimate on all `n` samples and the ends of its bootstrap interval."""

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict:
        return asdict(self)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Element-wise quotient, 0 where the denominator is 0 (the released evaluators' epsilon has the same effect)."""
    numerator, denominator = np.asarray(numerator, dtype=float), np.asarray(denominator, dtype=float)
    zeros = np.zeros(np.broadcast(numerator, denominator).shape)
    return np.divide(numerator, denominator, out=zeros, where=denominator != 0)


def statistics_of(
    columns: Sequence[str], **formulas: Callable[[SimpleNamespace], np.ndarray]
) -> dict[str, Statistic]:
    """Statistics as formulas over the columns' totals: `statistics_of(("right", "n"), accuracy=lambda t: t.right / t.n)`."""

    def statistic(formula: Callable[[SimpleNamespace], np.ndarray]) -> Statistic:
        return lambda totals: formula(SimpleNamespace(**{c: totals[..., i] for i, c in enumerate(columns)}))

    return {name: statistic(formula) for name, formula in formulas.items()}


def resampled_totals(counts: np.ndarray, rounds: int, seed: int | tuple[int, ...]) -> np.ndarray:
    """Totals of `rounds` resamples with replacement.

    Args:
        counts: `(n, columns)`.
        rounds: number of resamples.
        seed: the same seed and n give the same resamples, whatever the columns (which makes paired differences).

    Returns:
        `(rounds, columns)`.
    """
    n = len(counts)
    generator = np.random.default_rng(seed)
    totals = np.empty((rounds, counts.shape[1]))
    step = max(1, CELLS_AT_ONCE // n)
    for start in range(0, rounds, step):
        block = min(step, rounds - start)
        drawn = generator.integers(0, n, (block, n)) + n * np.arange(block)[:, None]
        multiplicities = np.bincount(drawn.ravel(), minlength=block * n).reshape(block, n)
        totals[start : start + block] = multiplicities @ counts
    return totals


def intervals(
    counts: np.ndarray,
    statistics: Mapping[str, Statistic],
    rounds: int = 100,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Every statistic on all samples with its percentile bootstrap interval; all of them on the same resamples.

    Args:
        counts: `(n, columns)` per-sample counts.
        statistics: by name, functions of summed counts `(…, columns)` to values `(…)`.
        rounds: resamples; 100 as in REVERSE's evaluation (arXiv 2504.13169, section 4).
        seed: seed of the resampling.
        level: mass between the two ends.

    Raises ValueError: no samples, or an argument out of range.
    """
    counts = _check(counts, rounds, level)
    totals, draws = counts.sum(axis=0), resampled_totals(counts, rounds, seed)
    return {
        name: _interval(statistic(totals), statistic(draws), level, len(counts))
        for name, statistic in statistics.items()
    }


def mean_of_groups(
    groups: Sequence[np.ndarray],
    statistics: Mapping[str, Statistic],
    rounds: int = 100,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """The mean over groups of every statistic; each group is resampled by itself.

    Args:
        groups: `(n, columns)` counts of each.

    Raises ValueError: as `intervals`.
    """
    groups = [_check(counts, rounds, level) for counts in groups]
    totals = [counts.sum(axis=0) for counts in groups]
    draws = [resampled_totals(counts, rounds, (seed, number)) for number, counts in enumerate(groups)]
    return {
        name: _interval(
            np.mean([statistic(total) for total in totals]),
            np.mean([statistic(drawn) for drawn in draws], axis=0),
            level,
            sum(map(len, groups)),
        )
        for name, statistic in statistics.items()
    }


def differences(
    counts_a: np.ndarray,
    counts_b: np.ndarray,
    statistics: Mapping[str, Statistic],
    rounds: int = 100,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """`statistic(a) - statistic(b)` where row i of both belongs to the same question: both are resampled together.

    Raises ValueError: the two matrices differ in shape, or see `intervals`.
    """
    counts_a, counts_b = _check(counts_a, rounds, level), _check(counts_b, rounds, level)
    if counts_a.shape != counts_b.shape:
        raise ValueError(f"paired counts must have the same shape, got {counts_a.shape} and {counts_b.shape}")
    width = counts_a.shape[1]
    draws = resampled_totals(np.hstack([counts_a, counts_b]), rounds, seed)
    return {
        name: _interval(
            statistic(counts_a.sum(axis=0)) - statistic(counts_b.sum(axis=0)),
            statistic(draws[:, :width]) - statistic(draws[:, width:]),
            level,
            len(counts_a),
        )
        for name, statistic in statistics.items()
    }


def bootstrap(
    counts: np.ndarray, statistic: Statistic, rounds: int = 100, seed: int = 0, level: float = 0.95
) -> Interval:
    """`intervals` of one statistic."""
    return intervals(counts, {"": statistic}, rounds, seed, level)[""]


def paired(
    counts_a: np.ndarray,
    counts_b: np.ndarray,
    statistic: Statistic,
    rounds: int = 100,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """`differences` of one statistic."""
    return differences(counts_a, counts_b, {"": statistic}, rounds, seed, level)[""]


def bootstrap_groups(
    groups: list[np.ndarray],
    statistic: Callable[[np.ndarray], float],
    rounds: int = 100,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """For statistics that are no function of sums, such as an area under a curve: resamples whole groups.

    Args:
        groups: one array per sample (phrases of one answer stay together: they are not independent).
        statistic: maps the concatenated rows to a number; resamples where it is NaN (one class only) are left out.

    Returns:
        An interval with NaN ends where no resample had a value.
    """
    if not groups:
        raise ValueError("no samples: there is nothing to resample")
    generator = np.random.default_rng(seed)
    value = float(statistic(np.concatenate(groups)))
    draws = []
    for _ in range(rounds):
        chosen = generator.integers(0, len(groups), len(groups))
        draws.append(float(statistic(np.concatenate([groups[index] for index in chosen]))))
    kept = np.asarray(draws)[~np.isnan(draws)]
    if not len(kept):
        return Interval(value, float("nan"), float("nan"), len(groups))
    return _interval(value, kept, level, len(groups))


def _check(counts: np.ndarray, rounds: int, level: float) -> np.ndarray:
    counts = np.asarray(counts, dtype=np.float64)
    if counts.ndim != 2:
        raise ValueError(f"counts must have shape (samples, columns), got {counts.shape}")
    if not len(counts):
        raise ValueError("no samples: there is nothing to resample")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie strictly between 0 and 1, got {level}")
    return counts


def _interval(value: float, draws: np.ndarray, level: float, n: int) -> Interval:
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    return Interval(float(value), float(low), float(high), n)
