import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl.data.convert import convert
from vlm_sft_rl.data.rows import read_regions
from vlm_sft_rl.data.sources.source import RegionFilter
from vlm_sft_rl.errors import RowError, UserError


def region(key, box=(1, 2, 30, 40), **fields) -> dict:
    return {"id": key, "image": "a.png", "width": 100, "height": 80, "box": list(box), **fields}


def apply(keep: RegionFilter, rows: list[dict]) -> tuple[list[dict], Counter]:
    notes: Counter = Counter()
    return list(keep.apply(lambda counter: iter(rows), notes)), notes


REGIONS = st.lists(
    st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.integers(1, 20)), min_size=1, max_size=12
)


@given(REGIONS, st.integers(1, 3) | st.none(), st.integers(1, 4) | st.none())
def test_filters_keep_what_a_slow_reading_of_their_limits_keeps(drawn, same, most):
    """Images may come in any order; the reference looks at each image by itself with everything in memory."""
    rows = [
        region(str(i), image=image, category=category, box=(0, 0, width, 10))
        for i, (image, category, width) in enumerate(drawn)
    ]
    kept, notes = apply(RegionFilter(min_side=4, max_same_category=same, max_per_image=most), rows)
    expected = []
    for image in "ab":
        there = [row for row in rows if row["image"] == image]
        counts = Counter(row["category"] for row in there)
        there = [r for r in there if r["box"][2] >= 4 and (same is None or counts[r["category"]] <= same)]
        expected += sorted(there, key=lambda r: (-r["box"][2], int(r["id"])))[:most]
    assert kept == sorted(expected, key=lambda r: int(r["id"]))
    assert len(kept) + sum(notes.values()) == len(rows)


def test_size_limits_and_their_reasons():
    boxes = {"thin": (3, 70), "small": (10, 10), "whole": (100, 80), "good": (50, 40)}
    rows = [region(name, (0, 0, *corner)) for name, corner in boxes.items()]
    kept, notes = apply(RegionFilter(min_side=5, min_area=0.02, max_area=0.9), rows)
    assert [row["id"] for row in kept] == ["good"]
    assert notes == {"side shorter than min_side": 1, "smaller than min_area": 1, "larger than max_area": 1}


@pytest.mark.parametrize(
    "limits, rows, message",
    [
        ({"min_area": 0.5, "max_area": 0.1}, [], r"min_area = 0\.5, expected a number <= max_area"),
        ({"min_side": -1}, [], "min_side = -1"),
        ({"max_per_image": 0}, [], "max_per_image = 0"),
        ({"max_same_category": 1}, [region("a")], "needs the field `category`"),
        ({"min_side": 1}, [{"id": "q", "question": "What?"}], "this row has no `box`"),
    ],
)
def test_limits_and_rows_that_do_not_fit(limits, rows, message):
    with pytest.raises(RowError if rows else UserError, match=message):
        apply(RegionFilter(**limits), rows)


def coco(path, images, categories, annotations):
    """A detection file: images of 100 x 80 by letter; annotations (image, category, bbox, whether it is a crowd)."""
    value = {
        "annotations": [
            {"id": i, "image_id": image, "bbox": bbox, "category_id": category, "iscrowd": int(crowd)}
            for i, (image, category, bbox, crowd) in enumerate(annotations, 1)
        ],
        "images": [{"id": k, "file_name": f"{k}.jpg", "width": 100, "height": 80} for k in images],
        "categories": [{"id": i, "name": name} for i, name in enumerate(categories, 1)],
    }
    path.write_text(json.dumps(value))
    return path


def test_converting_with_limits(tmp_path):
    """Crowds, edges and empty boxes are counted once, though the file is read twice; a small twin is a twin."""
    annotations = [
        ("x", 1, [10, 20, 30, 40], False),
        ("x", 2, [60, 20, 45, 40], False),
        ("x", 4, [0, 0, 9, 9], True),
        ("x", 2, [5, 5, 0, 9], False),
        ("x", 3, [0, 0, 50, 50], False),
        ("x", 3, [90, 0, 2, 2], False),
    ]
    path = coco(tmp_path / "coco.json", "x", ["cat", "dog", "cup", "fox"], annotations)
    target = tmp_path / "out.jsonl"
    report = convert(path, target, "coco", keep=RegionFilter(min_side=3, max_same_category=1))
    assert [(r["id"], r["box"], r["category"]) for r in read_regions(target)] == [
        ("1", [10, 20, 40, 60], "cat"),
        ("2", [60, 20, 100, 60], "dog"),
    ]
    notes = ("boxes of a crowd left out", "boxes without area left out", "boxes clipped to the image")
    notes += ("category not unique", "side shorter than min_side")
    assert report == {"rows": 2, "notes": dict.fromkeys(notes, 1)}
    with pytest.raises(UserError, match=r"no row is left \(.*smaller than min_area: 4"):
        convert(path, target, "coco", keep=RegionFilter(min_area=0.9))
    assert len(read_regions(target)) == 2  # what was there stays


def cats(path, *kinds):
    """Cats of 20 x 20 pixels, one image a letter; `a` a thing, `A` a box of a crowd."""
    boxes = [(kind.lower(), 1, [i, i, 20, 20], kind.isupper()) for i, kind in enumerate(kinds)]
    return coco(path, "abc", ["cat"], boxes)


@pytest.mark.parametrize("kinds", ["ACabcc", "abccAC"])
@pytest.mark.parametrize("most, kept", [(1, ["b"]), (2, ["a", "b"]), (3, ["a", "b", "c", "c"])])
def test_a_crowd_is_a_twin_and_no_row(tmp_path, most, kept, kinds):
    path = cats(tmp_path / "coco.json", *kinds)
    for limits in ({}, {"max_per_image": 2}):
        keep = RegionFilter(max_same_category=most, **limits)
        report = convert(path, tmp_path / "out.jsonl", "coco", keep=keep)
        assert [row["image"][0] for row in read_regions(tmp_path / "out.jsonl")] == kept
        assert report["notes"]["boxes of a crowd left out"] == 2


def test_rows_say_how_many_boxes_of_a_crowd_stand_beside_them(tmp_path):
    """So limits can be set later, on the rows as they were written."""
    convert(cats(tmp_path / "coco.json", *"abAA"), tmp_path / "all.jsonl", "coco")
    rows = read_regions(tmp_path / "all.jsonl")
    assert [row.get("crowds") for row in rows] == [2, None]
    assert apply(RegionFilter(max_same_category=1), rows)[0] == rows[1:]
