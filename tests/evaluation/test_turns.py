"""Correction turns: flips between answers, by turn and by group, and their place in a summary."""

import math
from fractions import Fraction

import families
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl.decoding import SamplingConfig
from vlm_sft_rl.evaluation.decoders import DECODERS, answer_batch
from vlm_sft_rl.evaluation.metrics import load_metric
from vlm_sft_rl.evaluation.turns import (
    RIGHT,
    UNREADABLE,
    WRONG,
    TurnGrades,
    after_turn,
    by_group,
    by_turn,
    first_confidence,
    flips,
    mcnemar,
    quantile_groups,
    turn_summary,
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
    result, n = flips(before, after, rounds=20), len(pairs)
    up = sum(a[0] != RIGHT and b[0] == RIGHT for a, b in pairs)
    down = sum(a[0] == RIGHT and b[0] != RIGHT for a, b in pairs)
    was, became = (sum(status == RIGHT for status, _ in side) for side in (before, after))
    expected = {
        "before": was / n,
        "after": became / n,
        "net_flips": (up - down) / n,
        "wrong_to_right": up / n,
        "right_to_wrong": down / n,
        "agreement": sum(a[1] is not None and a[1] == b[1] for a, b in pairs) / n,
        "unreadable_before": sum(status == UNREADABLE for status, _ in before) / n,
        "unreadable_after": sum(status == UNREADABLE for status, _ in after) / n,
        "kept_right": 1 - (down / was if was else 0),
        "repaired": up / (n - was) if n > was else 0,
    }
    assert {name: result[name]["value"] for name in expected} == pytest.approx(expected)
    assert result["net_flips"]["value"] == pytest.approx((became - was) / n)
    assert result["counts"] == {"wrong_to_right": up, "right_to_wrong": down} and result["n"] == n
    assert all(result[name]["low"] <= result[name]["high"] for name in expected)


def test_intervals_are_paired():
    """Two answers that differ on one question in a hundred differ by little, however uncertain each accuracy is."""
    rng = np.random.default_rng(0)
    before = [(RIGHT, "a") if rng.random() < 0.5 else (WRONG, "b") for _ in range(400)]
    after = [(RIGHT, "a") if i < 4 else answer for i, answer in enumerate(before)]
    result = flips(before, after, rounds=500)
    assert result["net_flips"]["high"] - result["net_flips"]["low"] < 0.03
    assert result["after"]["high"] - result["after"]["low"] > 0.08


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
    groups = by_group(grades, {"x": "one", "y": "two"}, 1, rounds=20)
    assert {name: group["net_flips"]["value"] for name, group in groups.items()} == {"one": 1, "two": -1}


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
            assert number[a] <= number[b] or values[a] > values[b]
            assert groups[a] == groups[b] or values[a] != values[b]
    # no group below the last holds less than its share, unless equal values pulled questions forward
    if len(set(values.values())) == len(values) and len(values) % count == 0:
        sizes = [list(number.values()).count(k) for k in range(1, count + 1)]
        assert sizes == [len(values) // count] * count


def sample(name, reference, *texts):
    trace = [{"kind": "turn", "text": text, "least_sure": 0.1 * (i + 1)} for i, text in enumerate(texts)]
    return {"id": name, "answer": texts[-1], "trace": trace, "reference": reference}


def staged(answer):
    return f"<CAPTION> no dogs </CAPTION>\n\n<CONCLUSION> {answer} </CONCLUSION>"


SAMPLES = [
    sample("a", {"answer": "yes", "category": "x"}, staged("no"), staged("yes")),
    sample("b", {"answer": "no", "category": "y"}, staged("no")),
    sample("c", {"answer": "no", "category": "y"}, "who knows", staged("No.")),
]


def test_only_conclusions_are_scored_and_stopped_answers_stay():
    assert [s["answer"] for s in after_turn(SAMPLES, 0)] == ["no", "no", "who knows"]
    assert [s["answer"] for s in after_turn(SAMPLES, 1)] == ["yes", "no", "No."]
    assert first_confidence(SAMPLES) == {"a": 0.1, "b": 0.1, "c": 0.1}


def test_a_summary_has_turns_flips_and_groups():
    summary = turn_summary(SAMPLES, load_metric("yes_no", {}), rounds=20)
    first, second = summary["turns"]
    assert first["metrics"]["accuracy"]["value"] == pytest.approx(1 / 3)
    assert first["metrics"]["unreadable"]["value"] == pytest.approx(1 / 3)
    assert second["metrics"]["accuracy"]["value"] == 1
    assert second["minus_turn_1"]["accuracy"]["value"] == pytest.approx(2 / 3)
    assert summary["flips"][1]["counts"] == {"wrong_to_right": 2, "right_to_wrong": 0}
    assert summary["by_category"]["x"]["net_flips"]["value"] == 1
    assert summary["by_category"]["y"]["agreement"]["value"] == 0.5
    assert sum(group["n"] for group in summary["by_confidence"].values()) == 3


def test_captions_have_turns_but_no_flips():
    truth = {"objects": ["cat"]}
    captions = [sample("a", truth, "a cat and a dog", "a cat"), sample("b", truth, "a dog", "a cat")]
    summary = turn_summary(captions, load_metric("chair", {"vocabulary": ["cat", "dog"]}), rounds=20)
    assert [t["metrics"]["chair_i"]["value"] for t in summary["turns"]] == [pytest.approx(2 / 3), 0]
    assert "flips" not in summary


def test_a_staged_answer_is_handed_on_as_its_conclusion():
    model, processor = families.llava()
    text = staged("yes")
    ids = processor.tokenizer.encode(text, add_special_tokens=False)
    config = SamplingConfig(max_new_tokens=len(ids))
    question = (DECODERS["greedy"], config, [None], ["Is it?"], ["a"], 1)
    answer_batch((model, processor), *question)  # the model is tried out in its first call
    written = iter(ids)

    def write(module, args, output):
        output = torch.full_like(output, -10.0)
        output[..., next(written)] = 10.0
        return output

    model.get_output_embeddings().register_forward_hook(write)
    (answer,) = answer_batch((model, processor), *question)
    assert answer["text"] == "yes" and answer["tagged_text"] == text
