"""Short answers: by a grader, also in circles of rotated options; and against several people's answers (VQA)."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.metrics.answers import AnswerAccuracy, VqaAccuracy, normalise, soft_accuracy


def circle(index, answer):
    return {"answer": answer, "choices": ["one", "two"], "circle": index}


def test_circular_questions_are_right_when_all_rotations_are():
    metric = AnswerAccuracy("choice", circular=True)
    references = [circle("1", "A"), circle("1", "B"), circle("2", "A"), circle("2", "B"), circle("3", "B")]
    answers = ["A", "B", "A", "A", "dunno what this long text means at all"]
    counts = metric.counts(answers, references)
    values = {name: i.value for name, i in metric.intervals(counts, 10).items()}
    assert len(counts) == 3 and values == pytest.approx({"accuracy": 1 / 3, "unreadable": 1 / 5})
    plain = AnswerAccuracy("choice").counts(answers, references)
    assert len(plain) == 5 and plain[:, 0].sum() == 3
    with pytest.raises(UserError, match="'circle' is missing"):
        metric.check({"answer": "A", "choices": ["one", "two"], "circle": None})


def test_right_wrong_and_unreadable_answers_are_told_apart():
    metric = AnswerAccuracy("mathvista")
    reference = metric.reference_of({"answer": "4"})
    answers = ["Answer: 4", "5", "I think about it for a very long time."]
    counts = metric.per_sample(answers, [reference] * 3)
    assert [metric.verdict(row) for row in counts] == ["right", "wrong", "unreadable"]
    assert counts[:, 0].tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    "text, normal",
    [
        ("The Dog.", "dog"),
        ("Two  dogs", "2 dogs"),
        ("none", "0"),
        ("1,000", "1000"),
        ("3.5 inches", "3.5 inches"),
        ("black/white", "black white"),
        ("black, white", "black white"),
        ("dont know", "don't know"),
        ("he'd've", "he'd've"),
        ("hed've", "he'd've"),
        ("well", "well"),
        ("t-shirt", "t shirt"),
        ("p.m.", "pm"),
        ("a man's hat\n", "man's hat"),
        ("", ""),
    ],
)
def test_answers_are_compared_in_their_normal_form(text, normal):
    assert normalise(text) == normal


@given(st.text("ab .,'/-0123?!", max_size=12))
def test_the_normal_form_knows_neither_case_nor_blanks(text):
    assert normalise(text.upper()) == normalise(f" {text}\n") == normalise(text)
    assert not re.search(r"[;/\[\]\"{}()=+\\_\-><@`,?!]", normalise(text))


@given(st.sampled_from("abc"), st.lists(st.sampled_from("abc"), min_size=4, max_size=10))
def test_accuracy_is_the_mean_over_all_sets_that_leave_one_person_out(answer, answers):
    sets = list(itertools.combinations(answers, len(answers) - 1))
    expected = sum(min(others.count(answer) / 3, 1) for others in sets) / len(sets)
    assert soft_accuracy(answer, answers) == pytest.approx(expected)


@pytest.mark.parametrize("agreeing, score", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_ten_people_give_steps_of_three_tenths(agreeing, score):
    people = ["A cat."] * agreeing + ["dog"] * (10 - agreeing)
    assert VqaAccuracy().sample_counts("cat", people)[0] == pytest.approx(score)


def test_what_is_no_short_answer_is_wrong_and_counted_apart():
    metric, people = VqaAccuracy(), ["yes"] * 9 + ["no"]
    talk = "It looks as if the man in the picture would say yes to that."
    result = metric.compute(predictions=["Yes.", talk, f"{talk}\nAnswer: yes"], references=[people] * 3)
    assert result == pytest.approx({"vqa_accuracy": 2 / 3, "unreadable": 1 / 3})


@pytest.mark.parametrize("reference", ["yes", ["yes"] * 3, [1, 2, 3, 4]])
def test_too_few_answers_are_refused(reference):
    with pytest.raises(UserError, match="at least 4 people's answers"):
        VqaAccuracy().check(reference)
