"""`jsonl`: which kind of row the columns make, and what the answer of a question with choices means."""

import json

import pytest
from json_lines import read_lines
from PIL import ExifTags, Image

from vlm_sft_rl.data.collators import RegionCollator
from vlm_sft_rl.data.convert import convert
from vlm_sft_rl.data.validate import validate
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
        return report["notes"], read_lines(tmp_path / "out.jsonl")

    return run


@pytest.mark.parametrize(
    "conversation",
    [{"messages": TALK}, {"conversations": TURNS}, {"prompt": "Describe.", "completion": "There is a cup."}],
)
@pytest.mark.parametrize("box", ["bbox", "box"])
def test_a_conversation_with_a_box_stays_one(converted, conversation, box):
    notes, (row,) = converted({**conversation, box: [10, 10, 40, 40], "width": 128, "height": 128})
    assert row["messages"] == TALK and row["images"] == ["a.png"]
    assert notes[f"field `{box}` is not known here and not used"] == 1


def test_a_question_with_a_box_stays_one_and_keeps_it(converted):
    _, (row,) = converted({"question": "Where is the cup?", "answer": "on the left", **BOX})
    assert (row["question"], row["answer"], row["bbox"]) == (
        "Where is the cup?",
        "on the left",
        [10, 10, 40, 40],
    )


def test_a_box_alone_or_one_that_is_mapped_makes_a_region(converted):
    notes, (row,) = converted({**BOX, "caption": "a cup", "level": "easy"})
    assert row["box"] == [10, 10, 40, 40] and row["expressions"] == ["a cup"] and "level" not in row
    assert notes == {"field `level` is not known here and not used": 1}
    row = {"question": "What is in the box?", "answer": ["a cup", "the cup"], **BOX}
    with pytest.raises(UserError, match="--map box=bbox"):
        converted(row)
    assert converted(row, fields={"box": "bbox"})[1][0]["expressions"] == ["a cup", "the cup"]


def test_paths_stay_as_they_are(converted, tmp_path):
    """Absolute ones too, for an image root of /; one that leaves its folder is refused where its size is looked up."""
    box = {"bbox": [10, 10, 40, 40]}
    for path in (str(tmp_path / "a.png"), "none/b.png", "/none/b.png"):
        row = {"image": path, **box, "width": 128, "height": 128}
        assert converted(row)[1][0]["image"] == path
        assert converted({"image": path, "question": "Which?", "answer": "it"})[1][0]["images"] == [path]
    (tmp_path.parent / "out.png").write_bytes((tmp_path / "a.png").read_bytes())
    with pytest.raises(UserError, match=r"in\.jsonl:1: .*outside"):
        converted({"image": "../out.png", **box})


def test_kinds_are_not_mixed(converted):
    question = {"question": "Which?", "answer": "it"}
    assert len(converted(question, {"messages": TALK})[1]) == 2  # both train
    with pytest.raises(UserError, match=r"several kinds in one file \(1 question, 1 region\)"):
        converted(question, BOX)
    with pytest.raises(UserError, match=r"several kinds in one file \(1 question, 1 SFT\)"):
        converted({"question": "Which?", "objects": ["cup"]}, {"messages": TALK})


def test_pairs_keep_both_answers(converted):
    _, (row,) = converted({"prompt": "Which?", "chosen": "this", "rejected": "that"}, image_prefix="train")
    assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == ("this", "that")
    assert row["images"] == ["train/a.png"]


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("stated", [{}, {"width": 128, "height": 96}])
def test_a_box_on_a_turned_picture_is_refused(converted, tmp_path, orientation, stated):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.new("RGB", (128, 96)).save(tmp_path / "turned.jpg", exif=exif)
    with pytest.raises(UserError, match=f"in.jsonl:1: .*EXIF orientation {orientation}"):
        converted({"image": "turned.jpg", "bbox": [10, 10, 40, 40], **stated})


def test_region_rows_on_a_turned_picture_are_refused_by_validation_and_training(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    Image.new("RGB", (128, 96)).save(tmp_path / "turned.jpg", exif=exif)
    row = {"id": "a", "image": "turned.jpg", "width": 128, "height": 96, "box": [10, 10, 40, 40]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    report = validate(tmp_path / "rows.jsonl", progress=False)
    assert "EXIF orientation 3" in str(report.to_json()["problems"])
    with pytest.raises(UserError, match=r"a: image 'turned\.jpg' has the EXIF orientation 3"):
        RegionCollator(tmp_path)([row])


def test_a_picture_of_another_size_than_the_row_says_is_refused(converted):
    with pytest.raises(
        UserError, match=r"in.jsonl:1: the size is given as 64 x 64, but image 'a.png' has 128 x 128"
    ):
        converted({"bbox": [10, 10, 40, 40], "width": 64, "height": 64})


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
        ("A", ["B", "A"], "A"),  # a capital letter is one
        ("a", ["b", "a"], None),
        ("B. sun", ["cup", "sun"], "B"),
        ("B. cup", ["cup", "sun"], None),
        ("cup", ["A. cup", "B. sun"], "A"),
        (1, ["1.0", "2.0"], None),
        ("b", ["b", "c"], None),
        ("cup", ["cup", "cup"], None),
        (True, ["cup", "sun"], None),
        (True, ["yes", "no", "unclear"], None),
        (float("nan"), ["cup", "sun"], None),
        (["B"], ["cup", "sun"], None),
        ({}, ["cup", "sun"], None),
        ("", ["cup", "sun"], None),
        ("9" * 5000, ["cup", "sun"], None),
        ("²", ["cup", "sun"], None),
        ("x27", [f"x{i}" for i in range(30)], None),
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


def test_a_mapped_column_that_no_row_has_is_an_error(tmp_path):
    rows = [{"question": "q", "answer": "a"}, {"question": "q", "answer": "a", "shown": "a.png"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for fields in ({"images": "picture"}, {"images": "shown", "unit": "picture"}):
        with pytest.raises(UserError, match=r"no row has: 'picture'|would be lost"):
            convert(tmp_path / "a.jsonl", tmp_path / "b.jsonl", "jsonl", fields=fields)
    report = convert(tmp_path / "a.jsonl", tmp_path / "b.jsonl", "jsonl", fields={"images": "shown"})
    assert report["rows"] == 2
