import json
import subprocess
import sys

import pytest
from PIL import Image

from vlm_sft_rl.data.collators import RegionCollator
from vlm_sft_rl.data.rows import (
    question_row,
    read_regions,
    read_rows,
    region_row,
    sft_row,
    strip_none,
    typed_messages,
)
from vlm_sft_rl.errors import RowError, UserError


def turns(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(values)]


def contents(row):
    return [(m["role"], m["content"]) for m in row["messages"]]


TYPED = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
]


@pytest.mark.parametrize(
    "raw",
    [
        {"id": 7, "image": "a.png", "conversations": turns("<image>\nWhat?", "A cat.")},
        {"id": "7", "images": ["a.png"], "messages": TYPED},
        {"id": "7", "images": ["a.png"], "prompt": "<image>\nWhat?", "completion": "A cat."},
        {"id": "7", "image": ["a.png"], "question": "<image>\nWhat?", "answer": "A cat."},
    ],
)
def test_the_four_schemas_give_the_same_row(raw):
    row = sft_row(raw, "f:1")
    assert contents(row) == [("user", "<image>\nWhat?"), ("assistant", "A cat.")]
    assert (row["id"], row["images"], row["source"]) == ("7", ["a.png"], "f:1")
    assert sft_row(row, row["source"]) == row


def test_the_published_tagged_schema():
    marked = {"A_type": "general_answer", "hint": "a red blender"}
    talk = turns("<image>\nWhat is there?", "<SPAN> A kettle </CN>.", "Is it on?", "<SPAN> Yes </UN>")
    talk[1] |= marked
    answer = sft_row({"id": "x", "image": "a.png", "conversations": talk}, "f:1")["messages"][1]
    assert (answer["answer_type"], answer["hint"]) == ("general_answer", "a red blender")


def test_keys_that_arrow_filled_in_are_dropped():
    words = [{"type": "text", "text": "Hi", "image": None}]
    messages = [
        {"role": "user", "content": words, "weight": None},
        {"role": "assistant", "content": "Hello", "hint": None, "answer_type": None},
    ]
    row = sft_row({"id": "1", "image": None, "images": None, "messages": messages}, "f:1")
    assert row["images"] == [] and row["messages"][1] == {"role": "assistant", "content": "Hello"}
    assert strip_none([{"a": None, "b": [{"c": None}]}]) == [{"b": [{}]}]


def test_leading_assistant_turn_is_dropped_and_counted(tmp_path, caplog):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"conversations": [{"from": "gpt", "value": "Hi"}, *turns("Q", "A")]}]))
    (row,) = read_rows(path)
    assert contents(row) == [("user", "Q"), ("assistant", "A")] and row["id"] == "a-1"
    assert "leading assistant turn dropped in 1 rows" in caplog.text


HEAVY = {"role": "assistant", "content": "b", "weight": 2}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"text": "x"}, ["unknown row", "conversations"]),
        ({"conversations": "x"}, ["`conversations`", "list of messages"]),
        ({"conversations": [{"from": "bot", "value": "x"}]}, ["`conversations[0]`", "'bot'"]),
        ({"conversations": [{"from": "human", "value": 3}]}, ["`conversations[0]`", "expected text"]),
        ({"conversations": turns("a", "b"), "image": 5}, ["`image`", "5"]),
        ({"conversations": turns("a", "b"), "image": ""}, ["`image`", "Leave the field out"]),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, ["turn 2", "alternate"]),
        ({"messages": [{"role": "user", "content": "a"}, HEAVY]}, ["`messages[1].weight`", "0 or 1"]),
        ({"question": "a", "answer": ["b"]}, ["`answer`", "expected text"]),
    ],
)
def test_errors_name_the_place_and_the_field(raw, words):
    with pytest.raises(RowError) as caught:
        sft_row(raw, "some.json:12")
    assert all(word in str(caught.value) for word in ["some.json:12", *words])


def question(text, answer, images):
    return sft_row({"id": "1", "images": images, "question": text, "answer": answer}, "f:3")


def test_placeholders_become_typed_content():
    row = question("See <image> and\n<image>", "x", ["a", "b"])
    image = {"type": "image"}
    see, also = {"type": "text", "text": "See "}, {"type": "text", "text": " and"}
    assert typed_messages(row)[0]["content"] == [see, image, also, image]
    row["messages"][0]["content"] = "What?"
    assert [p["type"] for p in typed_messages(row)[0]["content"]] == ["image", "image", "text"]


@pytest.mark.parametrize(
    ("text", "answer", "images"),
    [("<image> <image>", "x", ["a"]), ("<image>", "x", []), ("q", "an <image>", ["a"])],
)
def test_placeholder_mismatch(text, answer, images):
    with pytest.raises(RowError, match="f:3") as caught:
        typed_messages(question(text, answer, images))
    assert caught.value.kind == "placeholder mismatch"


def test_numbers_of_question_rows_become_text():
    raw = {"id": 3, "image": "a.png", "question": "How many?", "answer": 4, "unit": None, "grade": 2}
    row = {"id": "3", "question": "How many?", "answer": "4", "grade": 2, "images": ["a.png"]}
    assert question_row(raw, "f:1") == row
    assert contents(sft_row(raw, "f:1"))[1] == ("assistant", "4")


def test_elements_that_are_not_objects(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[[1]]")
    with pytest.raises(UserError, match="row 1: expected a JSON object"):
        list(read_rows(path))


def test_rows_and_tags_do_not_import_torch():
    code = "import sys, vlm_sft_rl.data.rows, vlm_sft_rl.data.tags; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- Region rows ---


def region(box=(1, 2, 30, 40), **fields) -> dict:
    return {"id": "a", "image": "a.png", "width": 100, "height": 80, "box": list(box), **fields}


@pytest.mark.parametrize(
    "row, message",
    [
        (region(box=(10, 10, 5, 20)), "inside an image of 100 x 80"),
        (region(box=(50, 50, 120, 60)), "--box-format xywh"),
        (region(box=(0.1, 0.2, 0.5, 0.9)), "multiply them by its width and height"),
        (region(box=(10, 10, 10.5, 20)), r"less than a pixel wide or high; boxes are in pixels\.$"),
        (region(box=(1, 2, 3)), "four numbers"),
        (region(box=(1, 2, "3", 4)), "four numbers"),
        (region(box=(1, 2, float("nan"), 4)), "four numbers"),
        (region(width=0), "field `width`: expected a whole number of pixels"),
        (region(expressions=["left cat", " "]), "field `expressions`: expected texts"),
        ({"id": "a", "box": [1, 2, 3, 4]}, "image, width, height missing"),
    ],
)
def test_bad_regions_say_what_is_wrong(row, message):
    with pytest.raises(RowError, match=message):
        region_row(row, "file:3")


def test_files_are_read_with_places(tmp_path):
    path = tmp_path / "regions.jsonl"
    path.write_text(json.dumps(region()) + "\n" + json.dumps(region(box=(9, 9, 9, 9))) + "\n")
    with pytest.raises(RowError, match=r"regions.jsonl:2"):
        read_regions(path)
    path.write_text("")
    with pytest.raises(UserError, match="no region rows"):
        read_regions(path)


def test_boxes_are_not_rounded():
    assert region_row(region(box=(1.23456, 2, 30, 40)))["box"] == [1.23456, 2.0, 30.0, 40.0]


def test_the_collator_opens_images_and_refuses_another_size(tmp_path):
    Image.new("L", (100, 80)).save(tmp_path / "a.png")
    row = RegionCollator(tmp_path)([region()])["rows"][0]
    assert row["picture"].mode == "RGB" and row["box"] == [1.0, 2.0, 30.0, 40.0]
    with pytest.raises(RowError, match="80 x 100, but the image has 100 x 80 pixels"):
        RegionCollator(tmp_path)([region(width=80, height=100)])
