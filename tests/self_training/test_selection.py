import random
from itertools import combinations, pairwise

import pools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl.self_training.figures import (
    answer_flips,
    interval,
    majority,
    majority_at,
    majority_right,
    out_of_candidates,
    pass_at_k,
    scaling,
)
from vlm_sft_rl.self_training.report import scaling_csv


def keyed(*keys, right="7"):
    return [
        pools.candidate(i, "unreadable" if k is None else "right" if k == right else "wrong", key=k)
        for i, k in enumerate(keys)
    ]


@pytest.mark.parametrize(
    ("keys", "chosen"),
    [
        (("7", "3", "7"), 0),
        (("3", "7", "7"), 1),
        (("3", "7"), 0),  # a tie goes to the answer that came first
        (("7", "3", "3", "7"), 0),
        ((None, None, "3"), 2),  # unreadable outputs do not vote
        ((None, None), None),
    ],
)
def test_majority(keys, chosen):
    group = keyed(*keys)
    found = majority(group)
    assert found is (None if chosen is None else group[chosen])
    assert majority_right(group) == (found is not None and found.key == "7")


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_mean_over_all_subsets(rights, data):
    k = data.draw(st.integers(1, len(rights)))
    subsets = list(combinations(rights, k))
    assert pass_at_k(rights, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_needs_k_samples():
    with pytest.raises(ValueError, match="k must lie in"):
        pass_at_k([True], 2)


def test_majority_over_subsets():
    group = keyed("7", "3", "7", "3", "3")
    assert majority_at(group, 5, seed=0) == 0.0
    assert majority_at(group, 1, seed=0) == 0.4
    # of ten triples three hold both rights
    assert majority_at(group, 3, seed=0) == 0.3
    assert majority_at(group, 3, seed=0, draws=9) == majority_at(group, 3, seed=0, draws=9)
    many = keyed(*"7333373377")  # four of ten are right: 1/3 of the triples have two of them
    assert majority_at(many, 3, seed=0, draws=100) == pytest.approx(1 / 3, abs=0.15)


def test_out_of_candidates():
    shown = keyed("7", "3")
    assert out_of_candidates(pools.candidate(0, "wrong", key="3"), shown) == 0
    assert out_of_candidates(pools.candidate(0, "wrong", key="9"), shown) == 1
    assert out_of_candidates(pools.candidate(0, "unreadable"), shown) == 1


def test_flips():
    assert answer_flips([0, 0, 1, 1], [1, 0, 0, 1]) == {
        "wrong to right": 1,
        "right to wrong": 1,
        "unchanged": 2,
    }


def test_curve_of_a_store():
    rng = random.Random(0)
    store = [keyed(*rng.choices(["7", "3", None], [5, 4, 1], k=10)) for _ in range(40)]
    points = scaling(store, rounds=50, seed=0)
    assert [p["n"] for p in points] == list(range(1, 11))
    single = sum(c.right for cs in store for c in cs) / 400
    assert points[0]["pass"] == points[0]["majority"]
    assert points[0]["pass"]["value"] == pytest.approx(single, abs=1e-4)
    assert all(a["pass"]["value"] <= b["pass"]["value"] for a, b in pairwise(points))
    assert points[-1]["majority"] == interval([majority_right(cs) for cs in store], 50, 0)
    for point in points:
        assert point["majority"]["low"] <= point["majority"]["value"] <= point["majority"]["high"]
    lines = scaling_csv([{"round": 2, "scaling": points}]).splitlines()
    assert lines[0] == "round,n,method,value,low,high" and len(lines) == 21
    assert lines[1].startswith("2,1,majority,")
