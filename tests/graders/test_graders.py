from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.graders import GRADERS, load_grader
from vlm_sft_rl.graders.text import final_answer, number_key, read_number

STATUS = {"R": "right", "W": "wrong", "F": "unreadable"}
ANGLES = ["30°", "45°", "60°", "90°"]


def table(name: str, fields: int) -> list[list[str]]:
    """Rows of a golden table, fields stripped of one blank on each side."""
    lines = (Path(__file__).parent / "golden" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split("|") for line in lines if line.strip() and not line.startswith("#")]
    assert all(len(row) == fields for row in rows), [row for row in rows if len(row) != fields]
    return [[field.strip().replace("\\n", "\n") for field in row] for row in rows]


def cases():
    for name in ("chartqa", "clevr_math"):
        for gold, output, strict, compat in table(name, 4):
            yield name, "ours", {"answer": gold}, output, strict
            yield name, "released", {"answer": gold}, output, compat
    for gold, output, strict, compat in table("geoqa", 4):
        for mode, status in (("ours", strict), ("released", compat)):
            yield "geoqa", mode, {"answer": gold, "choices": ANGLES}, output, status
    for gold, output, status in table("pocket", 3):
        yield "pocket", "ours", {"answer": gold}, output, status
        yield "pocket", "released", {"answer": gold}, output, status
    for gold, unit, output, strict, compat in table("tabmwp", 5):
        yield "tabmwp", "ours", {"answer": gold, "unit": unit}, output, strict
        yield "tabmwp", "released", {"answer": gold, "unit": unit}, output, compat
    for gold, options, output, strict, compat in table("tabmwp_choice", 5):
        for mode, status in (("ours", strict), ("released", compat)):
            yield "tabmwp", mode, {"answer": gold, "choices": options.split(";")}, output, status


CASES = list(cases())


@pytest.mark.parametrize(("name", "mode", "question", "output", "status"), CASES)
def test_golden_table(name, mode, question, output, status):
    grade = load_grader(name, mode)
    question = {"id": "q", **question}
    first = grade(output, question)
    if status == "?":
        assert first.status in ("right", "unreadable")  # never another option
    else:
        assert first.status == STATUS[status], first
    assert grade(output, question) == first
    assert (first.answer is None) == (first.key is None) == (first.status == "unreadable")


def test_the_released_free_credit_goes_to_three_of_four_outputs():
    grade = load_grader("geoqa", "released")
    question = {"id": "q", "answer": "C", "choices": ANGLES}
    rights = sum(grade(f"Answer: {number}", question).correct for number in range(1000, 3000))
    assert 0.72 < rights / 2000 < 0.78


# graders without rules of a released program to be checked against
OTHERS = ("choice", "exact", "mathvista")


def test_tables_are_large_enough():
    sizes = {name: len({(str(q), o) for n, _, q, o, _ in CASES if n == name}) for name in GRADERS}
    assert all(size >= 60 for name, size in sizes.items() if name not in OTHERS), sizes


@pytest.mark.parametrize(
    ("name", "question", "output", "status"),
    [
        ("exact", {"answer": "Blue"}, " blue. ", "right"),
        ("exact", {"answer": "blue"}, "light blue", "wrong"),
        ("mathvista", {"answer": "1.50", "answer_type": "float", "precision": 2}, "Answer: 1.5", "right"),
        ("mathvista", {"answer": "1.50", "answer_type": "float", "precision": 2}, "Answer: 1.6", "wrong"),
        ("choice", {"answer": "B", "choices": ["red", "blue"]}, "Answer: (B)", "right"),
        ("choice", {"answer": "B", "choices": ["red", "blue"]}, "Answer: (A)", "wrong"),
        ("choice", {"answer": "B", "choices": ["red", "blue"]}, "no idea", "unreadable"),
    ],
)
def test_the_other_graders(name, question, output, status):
    assert load_grader(name)(output, question | {"id": "q"}).status == status


@given(st.text(max_size=80), st.sampled_from(list(GRADERS)), st.sampled_from(["ours", "released"]))
def test_any_output_gets_a_verdict(output, name, mode):
    question = {"id": "q", "answer": "A" if name in ("geoqa", "choice") else "3", "choices": None}
    if name in ("geoqa", "choice"):
        question["choices"] = ANGLES
    grade = load_grader(name, mode)(output, question)
    assert grade.status in STATUS.values()
    assert grade == load_grader(name, mode)(output, question)


@given(st.fractions(max_denominator=999), st.sampled_from(["{}", "Answer: {}", "so the answer is {}."]))
def test_a_fraction_written_any_way_is_read_exactly(value, form):
    text = final_answer(form.format(f"{value.numerator}/{value.denominator}"))
    assert read_number(text) == value
    assert number_key(value) == number_key(read_number(number_key(value))) or value.denominator > 10**6


@given(st.integers(-(10**9), 10**9))
def test_thousands_and_currency_do_not_change_a_number(value):
    assert read_number(f"{value:,}") == read_number(f"${value}") == read_number(f"{value} %") == value


@pytest.mark.parametrize("text", ["", "-", "1/0", "1,2,3", "12a", "1.2.3", "/3", "$", "1 2"])
def test_what_is_no_number(text):
    assert read_number(text) is None


@pytest.mark.parametrize("mode", ["ours", "released"])
@pytest.mark.parametrize("gold", ["B", "dogs"])
def test_the_gold_option_may_be_a_letter_or_a_text(mode, gold):
    """Converted rows name the letter, TabMWP's own files the text."""
    question = {"id": "q", "answer": gold, "choices": ["cats", "dogs"]}
    grade = load_grader("tabmwp", mode)
    assert [grade(f"Answer: {text}", question).status for text in ("B", "(B)", "dogs")] == ["right"] * 3
    assert [grade(f"Answer: {text}", question).status for text in ("A", "(A)", "cats")] == ["wrong"] * 3


@pytest.mark.parametrize("name", ["chartqa", "tabmwp", "exact", "mathvista"])
def test_a_long_gold_answer_is_right_without_a_marker(name):
    question = {"id": "q", "answer": "Rising costs of food, rent and fuel"}
    grade = load_grader(name)
    assert grade("rising costs of food, rent and fuel.", question).correct
    assert grade("Rising costs of food, rent and fuel and more", question).status == "unreadable"


def test_bad_questions_are_named():
    with pytest.raises(UserError, match=r"question 'q7'.*neither a letter"):
        load_grader("tabmwp")("", {"id": "q7", "answer": "C", "choices": ["a cat", "a dog"]})
    with pytest.raises(UserError, match=r"question 'q7'.*'many' is no whole number"):
        load_grader("clevr_math")("", {"id": "q7", "answer": "many"})
    with pytest.raises(UserError, match=r"question 'q7'.*`answer`"):
        load_grader("chartqa")("x", {"id": "q7", "answer": ""})
    with pytest.raises(UserError, match=r"question 'q7'.*`choices`"):
        load_grader("geoqa")("x", {"id": "q7", "answer": "A"})
    with pytest.raises(UserError, match="neither a letter up to B"):
        load_grader("choice")("x", {"id": "q7", "answer": "C", "choices": ["a cat", "a dog"]})
    with pytest.raises(UserError, match="Graders: chartqa"):
        load_grader("vqa")
    with pytest.raises(UserError, match="rules is 'loose'"):
        load_grader("pocket", "loose")
