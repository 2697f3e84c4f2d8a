"""How boxes are written: each convention to the same pixels, and a file read in another one is refused."""

import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from json_lines import read_lines, write_lines

from vlm_sft_rl.data.convert import convert
from vlm_sft_rl.data.sources.conventions import BOX_FORMATS
from vlm_sft_rl.errors import UserError

SCALES = {"norm1": 1, "norm100": 100, "norm1000": 1000}


def written(box, size, name):
    """A box of pixels as a file of that convention has it."""
    x0, y0, x1, y1 = box
    if name == "xywh":
        return [x0, y0, x1 - x0, y1 - y0]
    if name == "xyxy":
        return list(box)
    return [value * SCALES[name] / side for value, side in zip(box, size * 2, strict=True)]


def source(tmp_path, boxes, sizes, name):
    rows = [
        {"id": str(i), "image": f"{i}.png", "width": w, "height": h, "bbox": written(box, (w, h), name)}
        for i, (box, (w, h)) in enumerate(zip(boxes, sizes, strict=True))
    ]
    path = tmp_path / "boxes.jsonl"
    write_lines(path, rows)
    return path


def converted(tmp_path, *words, **options):
    report = convert(source(tmp_path, *words), tmp_path / "rows.jsonl", "rec", **options)
    rows = read_lines(tmp_path / "rows.jsonl")
    return [row["box"] for row in rows], report["notes"]


def scattered(count, size, seed=0):
    """Boxes of 5 to 50 % of the sides, anywhere."""
    draw = random.Random(seed)
    boxes = []
    for _ in range(count):
        sides = [max(2, int(side * draw.uniform(0.05, 0.5))) for side in size]
        x, y = (draw.randint(0, side - length) for side, length in zip(size, sides, strict=True))
        boxes.append([x, y, x + sides[0], y + sides[1]])
    return boxes


SIZES = [(128, 128), (640, 480), (480, 640), (1920, 1080), (3000, 4000), (60, 90)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", BOX_FORMATS)
def test_every_convention_gives_the_same_pixels(tmp_path, name, size):
    boxes = scattered(12, size)
    rows, notes = converted(tmp_path, boxes, [size] * 12, name, box_format=name)
    assert notes == {}
    for row, box in zip(rows, boxes, strict=True):
        assert row == pytest.approx(box, abs=0.011)


@given(st.data())
def test_any_valid_box_is_read_exactly(tmp_path_factory, data):
    name = data.draw(st.sampled_from(["xyxy", "xywh"]))
    size = data.draw(st.tuples(st.integers(8, 4000), st.integers(8, 4000)))
    x, y = (data.draw(st.integers(0, side - 2)) for side in size)
    box = [x, y, data.draw(st.integers(x + 2, size[0])), data.draw(st.integers(y + 2, size[1]))]
    rows, _ = converted(tmp_path_factory.mktemp("boxes"), [box], [size], name, box_format=name)
    assert rows == [box]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("read", [None, *BOX_FORMATS])
@pytest.mark.parametrize("name", BOX_FORMATS)
def test_a_file_read_in_another_convention_is_refused_and_its_own_is_named(tmp_path, name, read, size):
    """Pixels that the person vouches for are believed where every box fits, but that they may be others is said."""
    boxes, options = scattered(30, size), {"box_format": read} if read else {}
    if (read or "xyxy") == name:
        assert converted(tmp_path, boxes, [size] * 30, name, **options)[1] == {}
        return
    try:
        _, notes = converted(tmp_path, boxes, [size] * 30, name, **options)
    except UserError as error:
        assert f"--box-format {name}" in str(error) and "boxes.jsonl" in str(error)
        assert not (tmp_path / "rows.jsonl").exists()
    else:
        assert read in ("xyxy", "xywh") and any(f"--box-format {name}" in note for note in notes)


@pytest.mark.parametrize("count", [1, 2, 5, 10])
@pytest.mark.parametrize("name", ["xywh", "norm1", "norm1000"])
def test_few_boxes_suffice_where_they_do_not_fit(tmp_path, name, count):
    with pytest.raises(UserError, match=f"--box-format {name}"):
        converted(tmp_path, [[70, 80, 110, 100]] * count, [(128, 128)] * count, name)


VALID = {
    "tiny objects at the upper left": [[i % 7, i % 5, i % 7 + 3, i % 5 + 4] for i in range(40)],
    "a corner of a hundred pixels": [[i, 90 - i, i + 8, 98 - i] for i in range(40)],
    "the whole image": [[0, 0, 640, 480]] * 20,
    "a logo of a hundred pixels": [[0, 0, 100, 100]] * 20,
    "objects that leave the image a little": [[600, 400, 643, 484]] * 10,
    "a tenth without area": [*[[50, 60, 50, 60]] * 2, *scattered(18, (640, 480))],
    "amodal boxes": [[a - 90, b - 60, c + 90, d + 60] for a, b, c, d in scattered(30, (640, 480))],
    "one": [[3, 4, 10, 12]],
}


@pytest.mark.parametrize("boxes", VALID.values(), ids=VALID)
@pytest.mark.parametrize("name", ["xyxy", "xywh"])
def test_valid_boxes_pass(tmp_path, name, boxes):
    rows, notes = converted(tmp_path, boxes, [(640, 480)] * len(boxes), name, box_format=name)
    assert len(rows) + notes.get("boxes without area left out", 0) == len(boxes)
    rows = converted(tmp_path, boxes, [(640, 480)] * len(boxes), "xyxy")[0]
    inside = [[max(0, a), max(0, b), min(640, c), min(480, d)] for a, b, c, d in boxes if c > a]
    assert rows == inside


def test_most_boxes_outside_of_their_images_are_an_error(tmp_path):
    with pytest.raises(
        UserError, match=r"20 of 20 boxes have nothing inside their images as xyxy.*--box-format xyxy, xywh"
    ):
        converted(tmp_path, [[2000, 2000, 2100, 2300]] * 20, [(640, 480)] * 20, "xyxy")


@pytest.mark.parametrize(
    "other",
    [
        lambda a, b, c, d: [2 * a, 2 * b, 2 * c, 2 * d],  # of a larger copy of the image
        lambda a, b, c, d: [(a + c) / 2, (b + d) / 2, c - a, d - b],  # centre and sides
        lambda a, b, c, d: [a, 480 - b, c, 480 - d],  # from the bottom
    ],
)
def test_boxes_of_no_known_convention_are_refused(tmp_path, other):
    boxes = [other(*box) for box in scattered(30, (640, 480))]
    with pytest.raises(UserError, match=r"have nothing inside|do not fit"):
        converted(tmp_path, boxes, [(640, 480)] * len(boxes), "xyxy")


@pytest.mark.parametrize(
    "change",
    [
        {"images": [{"id": 1, "file_name": f"{n}.png", "width": 9, "height": 9} for n in "ab"]},
        {"categories": [{"id": 1, "name": name} for name in ("cup", "sun")]},
        {"annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 3, 3], "iscrowd": "0"}]},
    ],
)
def test_what_coco_tables_leave_open_is_refused(tmp_path, change):
    tables = {
        "images": [{"id": 1, "file_name": "a.png", "width": 9, "height": 9}] * 2,
        "categories": [{"id": 1, "name": "cup"}] * 2,
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 3, 3], "iscrowd": False}],
    }
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(tables))
    assert convert(path, tmp_path / "rows.jsonl", "coco")["rows"] == 1
    path.write_text(json.dumps(tables | change))
    with pytest.raises(UserError, match=r"`id`: 1 is there twice|`iscrowd`: expected 0 or 1"):
        convert(path, tmp_path / "rows.jsonl", "coco")


@pytest.mark.parametrize(
    "bbox", [[1, 2, 3], "1,2,3,4", [1, 2, 3, math.nan], [1, 2, 3, True], [1, 2, 3, "4"], None, {}]
)
def test_a_box_is_four_numbers(tmp_path, bbox):
    path = tmp_path / "boxes.jsonl"
    path.write_text(json.dumps({"image": "a.png", "width": 9, "height": 9, "bbox": bbox, "sent": "it"}))
    with pytest.raises(UserError, match=r"boxes\.jsonl"):
        convert(path, tmp_path / "rows.jsonl", "rec")


def test_a_detection_file_with_corners_names_them(tmp_path):
    annotations = [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": box}
        for i, box in enumerate(scattered(20, (640, 480)))
    ]
    value = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 640, "height": 480}],
        "categories": [{"id": 1, "name": "cup"}],
        "annotations": annotations,
    }
    (tmp_path / "coco.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=r"do not fit .* as xywh .*--box-format xyxy"):
        convert(tmp_path / "coco.json", tmp_path / "rows.jsonl", "coco")
    assert convert(tmp_path / "coco.json", tmp_path / "rows.jsonl", "coco", box_format="xyxy") == {
        "rows": 20,
        "notes": {},
    }
