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
    st.builds(
        lambda image, category, width: (image, category, width),
        st.sampled_from(["a", "b"]),
        st.sampled_from("xyz"),
        st.integers(1, 20),
    ),
    min_size=1,
    max_size=12,
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
    for image in ("a", "b"):
        own = [row for row in rows if row["image"] == image]
        counts = Counter(row["category"] for row in own)
        own = [r for r in own if r["box"][2] >= 4 and (same is None or counts[r["category"]] <= same)]
        expected += sorted(own, key=lambda r: (-r["box"][2], int(r["id"])))[:most]
    assert kept == sorted(expected, key=lambda r: int(r["id"]))
    assert len(kept) + sum(notes.values()) == len(rows)


def test_size_limits_and_their_reasons():
    rows = [
        region("thin", (0, 0, 3, 70)),
        region("small", (0, 0, 10, 10)),
        region("whole", (0, 0, 100, 80)),
        region("good", (0, 0, 50, 40)),
    ]
    kept, notes = apply(RegionFilter(min_side=5, min_area=0.02, max_area=0.9), rows)
    assert [row["id"] for row in kept] == ["good"]
    assert notes == {"side shorter than min_side": 1, "smaller than min_area": 1, "larger than max_area": 1}


def test_limits_and_rows_that_do_not_fit():
    with pytest.raises(UserError, match="min_area <= max_area"):
        RegionFilter(min_area=0.5, max_area=0.1)
    with pytest.raises(UserError, match="max_per_image = 0"):
        RegionFilter(max_per_image=0)
    with pytest.raises(RowError, match="needs the field `category`"):
        apply(RegionFilter(max_same_category=1), [region("a")])
    with pytest.raises(RowError, match="this row has no `box`"):
        apply(RegionFilter(min_side=1), [{"id": "q", "question": "What?"}])


def test_converting_with_limits(tmp_path):
    """Crowds, edges and empty boxes are counted once, though the file is read twice; a small twin is a twin."""
    source = {
        "images": [{"id": 7, "file_name": "x/7.jpg", "width": 100, "height": 80}],
        "categories": [
            {"id": 1, "name": "cat"},
            {"id": 2, "name": "dog"},
            {"id": 3, "name": "cup"},
            {"id": 4, "name": "fox"},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "bbox": [10, 20, 30, 40], "category_id": 1},
            {"id": 2, "image_id": 7, "bbox": [60, 20, 45, 40], "category_id": 2},
            {"id": 3, "image_id": 7, "bbox": [0, 0, 9, 9], "category_id": 4, "iscrowd": 1},
            {"id": 4, "image_id": 7, "bbox": [5, 5, 0, 9], "category_id": 2},
            {"id": 5, "image_id": 7, "bbox": [0, 0, 50, 50], "category_id": 3},
            {"id": 6, "image_id": 7, "bbox": [90, 0, 2, 2], "category_id": 3},
        ],
    }
    (tmp_path / "coco.json").write_text(json.dumps(source))
    target = tmp_path / "out.jsonl"
    report = convert(
        tmp_path / "coco.json", target, "coco", keep=RegionFilter(min_side=3, max_same_category=1)
    )
    assert [(r["id"], r["box"], r["category"]) for r in read_regions(target)] == [
        ("1", [10, 20, 40, 60], "cat"),
        ("2", [60, 20, 100, 60], "dog"),
    ]
    assert report == {
        "rows": 2,
        "notes": {
            "boxes of a crowd left out": 1,
            "boxes without area left out": 1,
            "boxes clipped to the image": 1,
            "category not unique": 1,
            "side shorter than min_side": 1,
        },
    }
    with pytest.raises(UserError, match=r"no region is left \(.*smaller than min_area: 4"):
        convert(tmp_path / "coco.json", target, "coco", keep=RegionFilter(min_area=0.9))
    assert len(read_regions(target)) == 2  # what was there stays


def coco(path, *annotations):
    """Cats of 20 x 20 pixels, one image a letter: `cat` a thing, `crowd` a box of a crowd."""
    entries = [
        {
            "id": i,
            "image_id": image,
            "bbox": [i, i, 20, 20],
            "category_id": 1,
            "iscrowd": int(kind == "crowd"),
        }
        for i, (image, kind) in enumerate(annotations)
    ]
    images = [{"id": k, "file_name": f"{k}.jpg", "width": 100, "height": 80} for k in "abc"]
    source = {"annotations": entries, "images": images, "categories": [{"id": 1, "name": "cat"}]}
    path.write_text(json.dumps(source))
    return path


@pytest.mark.parametrize("crowd_first", [True, False])
@pytest.mark.parametrize("most, kept", [(1, ["b"]), (2, ["a", "b"]), (3, ["a", "b", "c", "c"])])
def test_a_crowd_is_a_twin_and_no_row(tmp_path, most, kept, crowd_first):
    cats = [("a", "cat"), ("b", "cat"), ("c", "cat"), ("c", "cat")]
    crowds = [("a", "crowd"), ("c", "crowd")]
    path = coco(tmp_path / "coco.json", *(crowds + cats if crowd_first else cats + crowds))
    for limits in ({}, {"max_per_image": 2}):
        report = convert(
            path, tmp_path / "out.jsonl", "coco", keep=RegionFilter(max_same_category=most, **limits)
        )
        rows = read_regions(tmp_path / "out.jsonl")
        assert [row["image"][0] for row in rows] == kept
        assert report["notes"]["boxes of a crowd left out"] == 2


def test_rows_say_how_many_boxes_of_a_crowd_stand_beside_them(tmp_path):
    """So limits can be set later, on the rows as they were written."""
    path = coco(tmp_path / "coco.json", ("a", "cat"), ("b", "cat"), ("a", "crowd"), ("a", "crowd"))
    convert(path, tmp_path / "all.jsonl", "coco")
    rows = read_regions(tmp_path / "all.jsonl")
    assert [row.get("crowds") for row in rows] == [2, None]
    assert apply(RegionFilter(max_same_category=1), rows)[0] == rows[1:]
