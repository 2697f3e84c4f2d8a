import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl.evaluation.turns import (
    RIGHT,
    UNREADABLE,
    WRONG,
    TurnGrades,
    by_group,
    by_turn,
    flips,
    mcnemar,
    quantile_groups,
)

answers = st.sampled_from([(RIGHT, "a"), (WRONG, "b"), (WRONG, "c"), (UNREADABLE, None)])


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial_test(up, down):
    n = up + down
    tail = sum(Fraction(math.comb(n, i), 2**n) for i in range(min(up, down) + 1))
    assert mcnemar(up, down) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-9)


def test_mcnemar_of_thousands_does_not_overflow():
    assert mcnemar(5000, 5000) == pytest.approx(1.0)
    assert 0 < mcnemar(2600, 2400) < 0.01


@given(st.lists(st.tuples(answers, answers), min_size=1, max_size=30))
def test_flips_equal_counting_by_hand(pairs):
    before, after = [a for a, _ in pairs], [b for _, b in pairs]
    found = flips(before, after, rounds=20)
    n, right = len(pairs), lambda answer: answer[0] == RIGHT
    up = sum(not right(a) and right(b) for a, b in pairs)
    down = sum(right(a) and not right(b) for a, b in pairs)
    was = sum(map(right, before))
    expected = {
        "before": was / n,
        "after": sum(map(right, after)) / n,
        "net_flips": (up - down) / n,
        "wrong_to_right": up / n,
        "right_to_wrong": down / n,
        "agreement": sum(a[1] is not None and a[1] == b[1] for a, b in pairs) / n,
        "unreadable_before": sum(a[0] == UNREADABLE for a in before) / n,
        "unreadable_after": sum(b[0] == UNREADABLE for b in after) / n,
        "kept_right": 1 - (down / was if was else 0),
        "repaired": up / (n - was) if n > was else 0,
    }
    assert {name: found[name]["value"] for name in expected} == pytest.approx(expected)
    assert found["net_flips"]["value"] == pytest.approx(found["after"]["value"] - found["before"]["value"])
    assert found["counts"] == {"wrong_to_right": up, "right_to_wrong": down} and found["n"] == n
    for name in expected:
        assert found[name]["low"] <= found[name]["high"]


def test_intervals_are_paired():
    """Two answers that differ on one question in a hundred differ by little, however uncertain each accuracy is."""
    rng = np.random.default_rng(0)
    before = [(RIGHT, "a") if rng.random() < 0.5 else (WRONG, "b") for _ in range(400)]
    after = [(RIGHT, "a") if i < 4 else answer for i, answer in enumerate(before)]
    found = flips(before, after, rounds=500)
    assert found["net_flips"]["high"] - found["net_flips"]["low"] < 0.03
    assert found["after"]["high"] - found["after"]["low"] > 0.08


def test_turns_that_stopped_early_keep_their_answer():
    grades = [TurnGrades((WRONG, RIGHT, RIGHT), ("b", "a", "a")), TurnGrades((RIGHT,), ("a",))]
    turns = by_turn(grades, rounds=20)["turns"]
    assert [t["after"]["value"] for t in turns] == [0.5, 1.0, 1.0]
    assert [t["reached"] for t in turns] == [2, 1, 1]
    assert turns[0]["net_flips"]["value"] == 0 and turns[0]["mcnemar"] == 1
    with pytest.raises(ValueError):
        by_turn([])


def test_groups():
    grades = {"x": TurnGrades((WRONG, RIGHT), ("b", "a")), "y": TurnGrades((RIGHT, WRONG), ("a", "b"))}
    found = by_group(grades, {"x": "one", "y": "two"}, 1, rounds=20)
    assert found["one"]["net_flips"]["value"] == 1 and found["two"]["net_flips"]["value"] == -1


@given(
    st.dictionaries(st.text(max_size=3), st.floats(0, 1).map(lambda x: round(x, 2)), min_size=1),
    st.integers(1, 5),
)
def test_quantiles_keep_order_and_equal_values_together(values, count):
    groups = quantile_groups(values, count)
    assert groups.keys() == values.keys()
    number = {key: int(name.split()[0]) for key, name in groups.items()}
    for a in values:
        for b in values:
            if values[a] < values[b]:
                assert number[a] <= number[b]
            elif values[a] == values[b]:
                assert groups[a] == groups[b]
    # no group below the last holds less than its share, unless equal values pulled questions forward
    if len(set(values.values())) == len(values) and len(values) % count == 0:
        sizes = [list(number.values()).count(k) for k in range(1, count + 1)]
        assert sizes == [len(values) // count] * count
