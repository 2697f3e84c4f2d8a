"""Question and region rows through `data validate`."""

import json

import pytest
from PIL import Image

from vlm_sft_rl.data.validate import validate

REGION = {
    "id": "r",
    "image": "a.png",
    "width": 20,
    "height": 16,
    "box": [1, 2, 20, 16],
    "expressions": ["it"],
}
QUESTION = {"id": "q", "images": ["a.png"], "question": "What?", "choices": ["x", "y"], "answer": "B"}


def problems(tmp_path, *rows):
    Image.new("RGB", (20, 16)).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return validate(tmp_path / "rows.jsonl", progress=False).problems


def test_good_rows(tmp_path):
    assert problems(tmp_path, REGION) == {}
    caption = {"id": "c", "images": ["a.png"], "question": "Describe it.", "objects": ["cat"]}
    assert problems(tmp_path, QUESTION, caption, {**QUESTION, "id": "t", "answer": "y"}) == {}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**REGION, "box": [1, 2, 21, 16]}, "inside an image of 20 x 16"),
        ({**REGION, "box": [5, 2, 5, 16]}, "--box-format xywh"),
        ({**REGION, "box": [1, 2, "3", 4]}, "expected four numbers"),
        ({**REGION, "width": 40, "height": 32}, "the image has 20 x 16 pixels"),
        ({**REGION, "width": None}, "width missing"),
        ({**REGION, "expressions": []}, "field `expressions`"),
        ({**REGION, "image": "b.png"}, "does not exist"),
        ({**QUESTION, "answer": "C"}, "neither a letter from A to B nor one of the choices"),
        ({**QUESTION, "choices": ["x"]}, "field `choices`"),
        ({**QUESTION, "question": " "}, "field `question`"),
        ({"id": "c", "images": ["b.png"], "question": "Describe it."}, "does not exist"),
    ],
)
def test_bad_rows(tmp_path, row, message):
    found = problems(tmp_path, row)
    assert [message in example for problem in found.values() for example in problem.examples] == [True]


@pytest.mark.parametrize("row", [REGION, {"id": "q", "images": [], "question": "Q?", "objects": []}])
def test_duplicate_ids(tmp_path, row):
    assert list(problems(tmp_path, row, row)) == ["duplicate id"]
