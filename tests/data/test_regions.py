import json

import pytest
from PIL import Image

from vlm_sft_rl.data.collators import RegionCollator
from vlm_sft_rl.data.rows import read_regions, region_row
from vlm_sft_rl.errors import RowError, UserError


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
        (region(width=0), "field `width`: expected a number of pixels"),
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
