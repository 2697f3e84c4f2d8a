import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_sft_rl.evaluation import bootstrap as module
from vlm_sft_rl.evaluation.bootstrap import (
    Interval,
    bootstrap,
    bootstrap_groups,
    differences,
    intervals,
    paired,
    ratio,
    statistics_of,
)


def share(totals):
    return ratio(totals[..., 0], totals[..., 1])


def slow_bootstrap(counts, statistic, rounds, seed, level):
    """Index, sum, divide, one resample at a time."""
    generator = np.random.default_rng(seed)
    draws = []
    for _ in range(rounds):
        rows = [counts[index] for index in generator.integers(0, len(counts), len(counts))]
        draws.append(float(statistic(np.array([sum(column) for column in zip(*rows, strict=True)]))))
    draws.sort()

    def quantile(q):
        position = q * (len(draws) - 1)
        floor = int(position)
        above = draws[min(floor + 1, len(draws) - 1)]
        return draws[floor] + (above - draws[floor]) * (position - floor)

    return quantile((1 - level) / 2), quantile(1 - (1 - level) / 2)


counts_matrices = st.integers(1, 25).flatmap(
    lambda n: st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 6)).map(lambda pair: (min(pair), pair[1])),
        min_size=n,
        max_size=n,
    )
)


@settings(max_examples=40, deadline=None)
@given(counts_matrices, st.integers(0, 5), st.sampled_from([0.5, 0.9, 0.95]))
def test_equals_the_slow_reference(rows, seed, level):
    counts = np.array(rows, dtype=float)
    fast = bootstrap(counts, share, rounds=30, seed=seed, level=level)
    low, high = slow_bootstrap(counts, share, 30, seed, level)
    assert fast.value == pytest.approx(share(counts.sum(axis=0)), abs=1e-12)
    assert (fast.low, fast.high) == pytest.approx((low, high), abs=1e-9)
    assert fast.n == len(rows)


def test_blocks_do_not_change_the_resamples(monkeypatch):
    counts = np.random.default_rng(0).integers(0, 5, (40, 2)).astype(float)
    whole = bootstrap(counts, share, rounds=50, seed=3)
    monkeypatch.setattr(module, "CELLS_AT_ONCE", 7 * 40)
    assert bootstrap(counts, share, rounds=50, seed=3) == whole
    assert bootstrap(counts, share, rounds=50, seed=4) != whole


def test_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(400):
        hits = generator.random(80) < 0.3
        interval = bootstrap(np.stack([hits, np.ones(80)], axis=1), share, rounds=300, seed=trial)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.90 <= covered / 400 <= 0.98


def test_pairing_removes_what_both_systems_share():
    generator = np.random.default_rng(2)
    hard = generator.random(300) < 0.5
    better = hard | (generator.random(300) < 0.05)
    one = np.ones(300)
    counts_a, counts_b = np.stack([better, one], axis=1), np.stack([hard, one], axis=1)
    difference = paired(counts_a, counts_b, share, rounds=200)
    assert difference.value == pytest.approx(better.mean() - hard.mean())
    assert 0 < difference.low < difference.high
    alone = bootstrap(counts_a, share, rounds=200)
    assert difference.high - difference.low < (alone.high - alone.low) / 2


def test_paired_with_itself_is_exactly_zero():
    counts = np.random.default_rng(3).integers(0, 4, (30, 2)).astype(float)
    assert paired(counts, counts, share) == Interval(0.0, 0.0, 0.0, 30)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"counts": np.zeros((0, 2))}, "no samples"),
        ({"counts": np.zeros(3)}, "shape"),
        ({"rounds": 0}, "rounds"),
        ({"level": 1.0}, "level"),
    ],
)
def test_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(**{"counts": np.ones((4, 2)), "statistic": share, **arguments})


def test_paired_refuses_different_shapes():
    with pytest.raises(ValueError, match="same shape"):
        paired(np.ones((3, 2)), np.ones((4, 2)), share)


def test_all_statistics_are_those_of_the_same_resamples():
    counts = np.random.default_rng(4).integers(0, 5, (30, 3)).astype(float)
    statistics = statistics_of(
        ("right", "wrong", "n"), right=lambda t: ratio(t.right, t.n), gap=lambda t: t.right - t.wrong
    )
    both, apart = intervals(counts, statistics, 50, 1), differences(counts, counts[::-1], statistics, 50, 1)
    for name, statistic in statistics.items():
        assert both[name] == bootstrap(counts, statistic, 50, 1)
        assert apart[name] == paired(counts, counts[::-1], statistic, 50, 1)
    total = counts.sum(axis=0)
    assert both["gap"].value == total[0] - total[1] and both["right"].value == total[0] / total[2]


def test_ratio_of_nothing_is_zero():
    assert ratio(np.array([0.0, 1.0, 3.0]), np.array([0.0, 0.0, 4.0])).tolist() == [0.0, 0.0, 0.75]


def test_groups_stay_together():
    # within a group all rows are equal, so the true spread is that of 10 values and not of 1000
    groups = [np.full(100, value) for value in np.linspace(0, 1, 10)]
    clustered = bootstrap_groups(groups, np.mean, rounds=200)
    independent = bootstrap_groups([np.array([v]) for v in np.concatenate(groups)], np.mean, rounds=200)
    assert clustered.value == pytest.approx(independent.value)
    assert clustered.high - clustered.low > 5 * (independent.high - independent.low)


def test_groups_without_a_value_give_nan_ends():
    interval = bootstrap_groups([np.ones(2)], lambda rows: math.nan, rounds=5)
    assert math.isnan(interval.low) and math.isnan(interval.high)
