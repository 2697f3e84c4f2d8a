import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlm_sft_rl.data.problems import RowError
from vlm_sft_rl.data.region_sources import convert_regions
from vlm_sft_rl.data.regions import RegionCollator, RegionFilter, check_region, read_regions
from vlm_sft_rl.errors import UserError


def region(box=(1, 2, 30, 40), **fields) -> dict:
    return {"id": "a", "image": "a.png", "width": 100, "height": 80, "box": list(box), **fields}


@pytest.mark.parametrize(
    "row, message",
    [
        (region(box=(10, 10, 5, 20)), "not inside of the image"),
        (region(box=(50, 50, 120, 60)), "corners .* not a corner and a size"),
        (region(box=(1, 2, 3)), "four numbers"),
        (region(box=(1, 2, "3", 4)), "four numbers"),
        ({"id": "a", "box": [1, 2, 3, 4]}, "image, width, height missing"),
    ],
)
def test_bad_regions_say_what_is_wrong(row, message):
    with pytest.raises(RowError, match=message):
        check_region(row, "file:3")


def test_files_are_read_with_places(tmp_path):
    path = tmp_path / "regions.jsonl"
    path.write_text(json.dumps(region()) + "\n" + json.dumps(region(box=(9, 9, 9, 9))) + "\n")
    with pytest.raises(RowError, match=r"regions.jsonl:2"):
        read_regions(path)
    path.write_text("")
    with pytest.raises(UserError, match="no region rows"):
        read_regions(path)


def many(labels: list[str]) -> list[dict]:
    return [region(id=str(i), label=name, box=(0, 0, 5 + i, 10)) for i, name in enumerate(labels)]


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=9), st.integers(1, 3), st.integers(1, 4))
def test_filters_keep_what_they_say_and_count_the_rest(labels, same, most):
    notes: Counter = Counter()
    rows = many(labels)
    kept = list(RegionFilter(max_same_label=same, max_per_image=most).apply(rows, notes))
    allowed = [r for r in rows if labels.count(r["label"]) <= same]
    assert len(kept) == min(most, len(allowed))
    assert len(kept) + sum(notes.values()) == len(rows)
    if kept:  # the largest, in the order of the file
        assert min(r["box"][2] for r in kept) >= max(
            [r["box"][2] for r in allowed if r not in kept], default=0
        )
        assert kept == sorted(kept, key=lambda r: int(r["id"]))


def test_size_limits_and_their_reasons():
    rows = [
        region(id="thin", box=(0, 0, 3, 70)),
        region(id="small", box=(0, 0, 10, 10)),
        region(id="whole", box=(0, 0, 100, 80)),
        region(id="good", box=(0, 0, 50, 40)),
    ]
    notes: Counter = Counter()
    kept = list(RegionFilter(min_side=5, min_area=0.02, max_area=0.9).apply(rows, notes))
    assert [row["id"] for row in kept] == ["good"]
    assert notes == {"side shorter than min_side": 1, "smaller than min_area": 1, "larger than max_area": 1}
    with pytest.raises(UserError, match="min_area <= max_area"):
        RegionFilter(min_area=0.5, max_area=0.1)
    with pytest.raises(RowError, match="needs the field `label`"):
        list(RegionFilter(max_same_label=1).apply([region()], Counter()))


def test_coco_with_crowds_edges_and_uniqueness(tmp_path):
    source = {
        "images": [{"id": 7, "file_name": "x/7.jpg", "width": 100, "height": 80}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 7, "bbox": [10, 20, 30, 40], "category_id": 1},
            {"id": 2, "image_id": 7, "bbox": [60, 20, 45, 40], "category_id": 2},
            {"id": 3, "image_id": 7, "bbox": [0, 0, 9, 9], "category_id": 2, "iscrowd": 1},
            {"id": 4, "image_id": 7, "bbox": [5, 5, 0, 9], "category_id": 2},
        ],
    }
    (tmp_path / "coco.json").write_text(json.dumps(source))
    notes = convert_regions(tmp_path / "coco.json", tmp_path / "out.jsonl", "coco")
    rows = read_regions(tmp_path / "out.jsonl")
    assert [(r["id"], r["box"], r["label"]) for r in rows] == [
        ("1", [10, 20, 40, 60], "cat"),
        ("2", [60, 20, 100, 60], "dog"),
    ]
    assert notes == {"crowd annotation": 1, "box without area": 1, "box clipped to the image": 1, "kept": 2}
    keep = RegionFilter(min_area=0.9)
    with pytest.raises(UserError, match="no region is left"):
        convert_regions(tmp_path / "coco.json", tmp_path / "out.jsonl", "coco", keep=keep)


def test_refcoco_lines_and_sc_tunes_list(tmp_path):
    line = {"image": "a.png", "sent": "left cat", "bbox": [1, 2, 30, 40], "width": 100, "height": 80}
    (tmp_path / "refcoco.jsonl").write_text(json.dumps(line) + "\n")
    convert_regions(tmp_path / "refcoco.jsonl", tmp_path / "out.jsonl", "refcoco")
    assert read_regions(tmp_path / "out.jsonl")[0]["expression"] == "left cat"
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    (tmp_path / "list.json").write_text(json.dumps([{"image_id": "a.png", "bbox": [0.1, 0.2, 0.5, 1.0]}]))
    convert_regions(tmp_path / "list.json", tmp_path / "out.jsonl", "sc-tune", image_root=tmp_path)
    assert read_regions(tmp_path / "out.jsonl")[0]["box"] == pytest.approx([20, 20, 100, 100])
    (tmp_path / "list.json").write_text(json.dumps([{"image_id": "a.png", "bbox": [10, 20, 50, 100]}]))
    with pytest.raises(RowError, match="four shares from 0 to 1"):
        convert_regions(tmp_path / "list.json", tmp_path / "out.jsonl", "sc-tune", image_root=tmp_path)


def test_the_collator_opens_images_and_refuses_another_size(tmp_path):
    Image.new("L", (100, 80)).save(tmp_path / "a.png")
    row = RegionCollator(tmp_path)([region()])["rows"][0]
    assert row["picture"].mode == "RGB" and row["box"] == [1.0, 2.0, 30.0, 40.0]
    with pytest.raises(RowError, match="is 100x80, the row says 80x100"):
        RegionCollator(tmp_path)([region(width=80, height=100)])
