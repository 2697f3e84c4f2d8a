"""VQA's accuracy against hand-worked values, and a slow reading of its definition."""

import itertools
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from owners_files import write_benchmark

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.metrics import load_metric
from vlm_sft_rl.evaluation.metrics.answers import normalise, soft_accuracy
from vlm_sft_rl.evaluation.questions import load_questions
from vlm_sft_rl.evaluation.specs import load_spec


@pytest.mark.parametrize(
    "text, wanted",
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
def test_answers_are_compared_in_their_normal_form(text, wanted):
    assert normalise(text) == wanted


@given(st.text("ab .,'/-0123?!", max_size=12))
def test_the_normal_form_knows_neither_case_nor_blanks(text):
    assert normalise(text.upper()) == normalise(f" {text}\n") == normalise(text)
    assert not re.search(r"[;/\[\]\"{}()=+\\_\-><@`,?!]", normalise(text))


@given(st.sampled_from("abc"), st.lists(st.sampled_from("abc"), min_size=4, max_size=10))
def test_accuracy_is_the_mean_over_all_sets_that_leave_one_person_out(answer, answers):
    sets = list(itertools.combinations(answers, len(answers) - 1))
    wanted = sum(min(own.count(answer) / 3, 1) for own in sets) / len(sets)
    assert soft_accuracy(answer, answers) == pytest.approx(wanted)


@pytest.mark.parametrize("agreeing, wanted", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_ten_people_give_steps_of_three_tenths(agreeing, wanted):
    metric = load_metric("vqa_accuracy", {})
    said = ["A cat."] * agreeing + ["dog"] * (10 - agreeing)
    assert metric.sample_counts("cat", said)[0] == pytest.approx(wanted)


def test_what_is_no_short_answer_is_wrong_and_counted_apart():
    metric, said = load_metric("vqa_accuracy", {}), ["yes"] * 9 + ["no"]
    talk = "It looks as if the man in the picture would say yes to that."
    found = metric.compute(predictions=["Yes.", talk, f"{talk}\nAnswer: yes"], references=[said] * 3)
    assert found == pytest.approx({"vqa_accuracy": 2 / 3, "unreadable": 1 / 3})
    assert metric.sample_counts("Yes.", ["yes"] * 10)[0] == 1


@pytest.mark.parametrize("reference", ["yes", ["yes"] * 3, [1, 2, 3, 4]])
def test_too_few_answers_are_refused(reference):
    with pytest.raises(UserError, match="at least 4 people's answers"):
        load_metric("vqa_accuracy", {}).check(reference)


@pytest.mark.parametrize(
    "name, answers, scores, categories",
    [
        ("vqav2", ["at table", "2"], [0.9, 1], ["other", "number"]),
        ("okvqa", ["Riding."], [0.6], ["other"]),
        ("vizwiz", ["Unanswerable.", "soda"], [1, 0.9], ["unanswerable", "other"]),
    ],
)
def test_from_the_owners_files_to_scores(name, answers, scores, categories, tmp_path):
    spec = load_spec(name)
    metric = load_metric(spec.metric, spec.metric_options)
    rows = load_questions(spec, write_benchmark(name, tmp_path), metric).rows
    found = metric.per_sample(answers, [metric.reference_of(row) for row in rows])
    assert found[:, 0].tolist() == pytest.approx(scores)
    assert [row["category"] for row in rows] == categories


def test_a_question_without_answers_is_named(tmp_path):
    data = write_benchmark("okvqa", tmp_path)
    file = data / "mscoco_val2014_annotations.json"
    value = json.loads(file.read_text())
    value["annotations"][0]["question_id"] = 5
    file.write_text(json.dumps(value))
    spec = load_spec("okvqa")
    with pytest.raises(
        UserError, match=r"questions\.json:1: question 2971475 has no answers in .*another split"
    ):
        load_questions(spec, data, load_metric(spec.metric, spec.metric_options))


def test_questions_without_pictures_are_left_out_of_scienceqa(tmp_path):
    spec = load_spec("scienceqa")
    metric = load_metric(spec.metric, spec.metric_options)
    rows = load_questions(spec, write_benchmark("scienceqa", tmp_path), metric).rows
    assert [(row["id"], row["answer"], row["category"]) for row in rows] == [
        ("4", "B", "natural science"),
        ("7", "C", "social science"),
    ]
    assert rows[0]["question"].startswith("Figure: tide pool.\nWhich better")
