"""Votes over candidates, how much each one counts, and what the first k are worth."""

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl.decoding.tried import weights
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.metrics import load_metric
from vlm_sft_rl.evaluation.votes import by_count, vote
from vlm_sft_rl.graders.grade import majority_index


@pytest.mark.parametrize(
    ("keys", "chosen"),
    [
        (["a", "b", "b"], 1),
        (["a", "b"], 0),
        (["b", "a", "a", "b"], 0),
        ([None, None, "x"], 2),
        ([None, "x", None, "y", "y"], 3),
        ([None], None),
        ([], None),
    ],
)
def test_the_majority_is_the_first_of_the_most_frequent(keys, chosen):
    assert majority_index(keys) == chosen


def drawn(*texts, answer=None, probabilities=None, truth="yes", name="a"):
    event = {"kind": "candidates", "texts": list(texts)}
    if probabilities is not None:
        event["probabilities"] = probabilities
    return {"id": name, "answer": answer or texts[0], "trace": [event], "reference": {"answer": truth}}


STAGED = "<CAPTION> no </CAPTION>\n\n<CONCLUSION> yes </CONCLUSION>"


@pytest.mark.parametrize(
    ("texts", "answer", "keys"),
    [
        (["no", "Yes, it is.", "yes"], "Yes, it is.", ["no", "yes", "yes"]),
        (["who knows", "no"], "no", [None, "no"]),
        (["who knows", "maybe"], "who knows", [None, None]),
        ([STAGED, "no", "yes"], "yes", ["yes", "no", "yes"]),
        (["<SPAN>no</CN>", "yes", "no"], "no", ["no", "yes", "no"]),
    ],
)
def test_the_vote_reads_candidates_as_they_are_scored(texts, answer, keys):
    winner = vote(drawn(*texts), load_metric("yes_no", {}))
    assert winner["answer"] == answer == winner["accepted_answer"]
    assert winner["trace"][-1]["kind"] == "vote" and winner["trace"][-1]["keys"] == keys


@pytest.mark.parametrize(
    ("selected", "texts", "answer"),
    [
        ("yes", ["no", "no", "yes"], "yes"),  # a candidate says so: the model's choice stands
        ("yes", ["no", "no", "who knows"], "no"),  # no candidate says so
        ("hm", ["no", "yes", "yes"], "yes"),
        ("hm", ["who", "knows"], "hm"),  # nothing to fall back to
    ],
)
def test_the_fallback_is_for_selections_outside_the_candidates(selected, texts, answer):
    winner = vote(drawn(*texts, answer=selected), load_metric("yes_no", {}), keep_selected=True)
    assert winner["answer"] == answer


def test_a_released_grader_gives_no_answer_away():
    """Its rules credit outputs without an answer with the true one; a vote that read by them would know it."""
    metric = load_metric("answer_accuracy", {"grader": "geoqa", "rules": "released"})
    reference = {"answer": "B", "choices": ["one", "two"]}
    assert any(metric.grade(text, reference) for text in "12345")
    assert [metric.read(text, reference) for text in "12345"] == [None] * 5
    assert metric.read("Answer: (A)", reference) == "A"


LAWS = st.lists(st.sampled_from([1e-9, 0.01, 0.2, 1.0, 5.0]), min_size=2, max_size=5)


@given(LAWS, st.integers(1, 5))
def test_the_weights_of_an_answer_are_its_probability_on_average(law, n):
    """Over all draws without replacement, whatever had a chance; with nothing left they are the probabilities."""
    p = [value / sum(law) for value in law]
    n = min(n, len(p))
    means = [0.0] * len(p)
    for drawn in permutations(range(len(p)), n):
        chance, left = 1.0, 1.0
        for i in drawn:
            chance, left = chance * min(1.0, p[i] / max(left, 1e-12)), left - p[i]
        for i, weight in zip(drawn, weights([p[i] for i in drawn]), strict=True):
            means[i] += chance * weight
    assert means == pytest.approx(p, abs=1e-6)
    assert weights(p) == pytest.approx(p, abs=1e-6)


@pytest.mark.parametrize("p", [1e-20, 0.0])
def test_answers_of_which_hardly_anything_was_drawn_count_alike(p):
    assert weights([p] * 4) == pytest.approx([0.25] * 4)
    assert weights([p, 100 * p]) == pytest.approx([0.5, 0.5])


def test_the_likelier_answer_outweighs_two_of_the_others():
    metric = load_metric("yes_no", {})
    texts = ["No.", "Yes.", "No, none."]
    assert vote(drawn(*texts), metric)["answer"] == "No."
    assert vote(drawn(*texts, probabilities=[0.1, 0.8, 0.05]), metric)["answer"] == "Yes."
    # of so little, two say more than one
    assert vote(drawn(*texts, probabilities=[1e-9, 1e-8, 1e-9]), metric)["answer"] == "No."


def test_the_first_candidates_by_their_number():
    metric = load_metric("yes_no", {})
    samples = [
        drawn("no", "yes", "yes", "who knows"),
        drawn("yes", "no", name="b"),
        drawn("Yes", "No, none.", "no", "no", truth="no", name="c"),
    ]
    figures = by_count(samples, metric, rounds=10)
    assert [row["k"] for row in figures] == [1, 2, 3, 4]
    for choice, expected in {"vote": [1, 1, 3, 3], "best": [1, 3, 3, 3]}.items():
        assert [round(3 * row[choice]["accuracy"]["value"]) for row in figures] == expected
    assert [3 * row["texts"] for row in figures] == pytest.approx([3, 6, 7, 8])
    assert [3 * row["answers"] for row in figures] == pytest.approx([3, 6, 6, 6])


@pytest.mark.parametrize(
    ("trace", "message"),
    [
        ([], "sample 'a': no candidates in its trace"),
        ([{"kind": "candidates", "texts": []}], "sample 'a': no candidates in its trace"),
        (
            [{"kind": "candidates", "texts": ["yes"], "probabilities": [0.5, 0.1]}],
            "sample 'a': 2 probabilities of 1 candidates",
        ),
    ],
)
def test_a_trace_without_candidates_is_told(trace, message):
    with pytest.raises(UserError, match=message):
        by_count([drawn("yes") | {"trace": trace}], load_metric("yes_no", {}))
