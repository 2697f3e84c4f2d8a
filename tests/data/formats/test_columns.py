"""`jsonl`: which kind of row the columns make, and what the answer of a question with choices means."""

import json

import pytest
from PIL import Image

from vlm_sft_rl.data.convert import convert
from vlm_sft_rl.errors import UserError

TALK = [{"role": "user", "content": "Describe."}, {"role": "assistant", "content": "There is a cup."}]
TURNS = [{"from": "human", "value": "Describe."}, {"from": "gpt", "value": "There is a cup."}]
BOX = {"bbox": [10, 10, 40, 40], "width": 128, "height": 128}


@pytest.fixture
def converted(tmp_path):
    def run(*rows, **options):
        Image.new("RGB", (128, 128)).save(tmp_path / "a.png")
        text = "".join(json.dumps({"image": "a.png", **row}) + "\n" for row in rows)
        (tmp_path / "in.jsonl").write_text(text)
        report = convert(tmp_path / "in.jsonl", tmp_path / "out.jsonl", "jsonl", **options)
        return report["notes"], [
            json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()
        ]

    return run


@pytest.mark.parametrize(
    "conversation",
    [{"messages": TALK}, {"conversations": TURNS}, {"prompt": "Describe.", "completion": "There is a cup."}],
)
@pytest.mark.parametrize("box", ["bbox", "box"])
def test_a_conversation_with_a_box_stays_one(converted, conversation, box):
    notes, (row,) = converted({**conversation, box: [10, 10, 40, 40], "width": 128, "height": 128})
    assert row["messages"] == TALK and row["images"] == ["a.png"]
    assert notes["boxes beside conversations left out"] == 1


def test_a_question_with_a_box_stays_one_and_keeps_it(converted):
    _, (row,) = converted({"question": "Where is the cup?", "answer": "on the left", **BOX})
    assert (row["question"], row["answer"], row["bbox"]) == (
        "Where is the cup?",
        "on the left",
        [10, 10, 40, 40],
    )


def test_a_box_alone_or_one_that_is_mapped_makes_a_region(converted):
    notes, (row,) = converted({**BOX, "caption": "a cup", "iscrowd": 0, "source": "x"})
    assert row["box"] == [10, 10, 40, 40] and row["expressions"] == ["a cup"]
    assert "column 'source' left out of regions" in notes
    row = {"question": "What is in the box?", "answer": ["a cup", "the cup"], **BOX}
    with pytest.raises(UserError, match="--map box=bbox"):
        converted(row)
    assert converted(row, fields={"box": "bbox"})[1][0]["expressions"] == ["a cup", "the cup"]


@pytest.mark.parametrize(
    ("answer", "choices", "letter"),
    [
        ("B", ["cup", "sun"], "B"),
        ("b", ["cup", "sun"], "B"),
        ("(B)", ["cup", "sun"], "B"),
        ("B.", ["cup", "sun"], "B"),
        ("B)", ["cup", "sun"], "B"),
        ("[b]", ["cup", "sun"], "B"),
        (" B: ", ["cup", "sun"], "B"),
        (1, ["cup", "sun"], "B"),
        (1.0, ["cup", "sun"], "B"),
        ("1", ["cup", "sun"], "B"),
        ("sun", ["cup", " sun "], "B"),
        ("Sun", ["cup", "sun"], "B"),
        (0, ["cup", "sun"], "A"),
        (20, [10, 20], "B"),
        (0, [10, 20], "A"),
        ("1", ["2", "1"], "B"),
        ("1", ["1", "2"], "A"),
        (True, ["yes", "no"], "A"),
        (False, ["yes", "no"], "B"),
        (True, ["No", "Yes"], "B"),
        (False, ["True", "False"], "B"),
        ("yes", ["yes", "no"], "A"),
        ("B", ["A", "B", "C"], "B"),
        # neither letter, index nor choice, or two of them
        ("C", ["cup", "sun"], None),
        (2, ["cup", "sun"], None),
        (-1, ["cup", "sun"], None),
        (0.5, ["cup", "sun"], None),
        ("moon", ["cup", "sun"], None),
        (1, [1, 2], None),
        (1, ["2", "1", "0"], "B"),
        ("A", ["B", "A"], None),
        ("b", ["b", "c"], None),
        ("cup", ["cup", "cup"], None),
        (True, ["cup", "sun"], None),
        (True, ["yes", "no", "unclear"], None),
        (float("nan"), ["cup", "sun"], None),
        (["B"], ["cup", "sun"], None),
        ({}, ["cup", "sun"], None),
        ("", ["cup", "sun"], None),
        ("9" * 5000, ["cup", "sun"], None),
    ],
)  # fmt: skip
def test_the_answer_among_choices(converted, answer, choices, letter):
    row = {"id": "a", "question": "Which?", "choices": choices, "answer": answer}
    if letter is None:
        with pytest.raises(UserError, match="answer"):
            converted(row)
    else:
        _, (written,) = converted(row)
        assert (written["answer"], written["answer_type"]) == (letter, "choice")
        assert written["choices"] == [str(choice).strip() for choice in choices]


@pytest.mark.parametrize(
    "choices",
    [
        ["cup"],
        "cup, sun",
        {"A": "cup", "B": "sun"},
        [True, False],
        [["cup"], ["sun"]],
        ["cup", float("nan")],
        ["cup", None],
        ["cup", " "],
        ["x"] * 27,
    ],
)
def test_choices_are_two_texts_or_more(converted, choices):
    with pytest.raises(UserError, match=r"choices|finite|NaN"):
        converted({"question": "Which?", "choices": choices, "answer": "A"})


@pytest.mark.parametrize("field", ["id", "question", "answer"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, ["x"], {}])
def test_values_that_are_no_text(converted, field, value):
    with pytest.raises(UserError, match=r"in\.jsonl"):
        converted({"id": "a", "question": "How many?", "answer": "2", field: value})
