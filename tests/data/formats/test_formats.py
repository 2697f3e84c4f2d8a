"""Every source format, from a file in its owner's schema to the rows that it must give (`expected.json`)."""

import json
import random
from pathlib import Path

import pytest
from json_lines import read_lines
from PIL import Image

from vlm_sft_rl.data.convert import FORMATS, convert
from vlm_sft_rl.data.rows import read_rows
from vlm_sft_rl.data.sources.questions import answer_type
from vlm_sft_rl.data.validate import validate
from vlm_sft_rl.errors import UserError

HERE = Path(__file__).parent
EXPECTED = json.loads((HERE / "expected.json").read_text(encoding="utf-8"))
COLUMNS = {"question": "problem", "answer": "solution", "images": "picture", "id": "uid"}


def fixture(name: str) -> Path:
    return next((HERE / "fixtures").glob(f"{name}.json*"))


@pytest.fixture
def converted(tmp_path):
    """Converts a source, by default the fixture of the format, and gives the report and the rows."""
    Image.new("RGB", (20, 16)).save(tmp_path / "a.png")

    def run(name, source=None, **options):
        options |= {"annotations": fixture("coco")} if name == "refcoco" else {}
        report = convert(source or fixture(name), tmp_path / "rows.jsonl", name, **options)
        return report, read_lines(tmp_path / "rows.jsonl")

    return run


@pytest.mark.parametrize("name", EXPECTED)
def test_rows_are_as_expected(name, converted):
    report, rows = converted(name)
    assert rows == EXPECTED[name] and report["rows"] == len(rows)


def test_what_is_left_out_is_counted(converted):
    assert converted("coco")[0]["notes"] == {
        "boxes of a crowd left out": 1,
        "boxes clipped to the image": 1,
        "boxes without area left out": 1,
    }
    assert converted("llava_cot")[0]["notes"] == {"answers without the four stages": 1}
    assert converted("geoqa")[0]["notes"] == {}


@pytest.mark.parametrize("name", ["llava", "reverse", "llava_cot"])
def test_conversations_keep_every_turn(name, converted):
    _, rows = converted(name)
    assert [{k: v for k, v in row.items() if k != "source"} for row in read_rows(fixture(name))] == rows
    if name == "reverse":
        assert rows[0]["messages"][1]["hint"] == "a red blender"


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("trl", "hf")])
def test_what_is_written_validates(name, converted, tmp_path):
    _, rows = converted(name, **({"fields": COLUMNS} if name == "jsonl" else {}))
    for row in rows:
        for image in [*row.get("images", []), *([row["image"]] if "image" in row else [])]:
            path = tmp_path / image
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (row.get("width", 20), row.get("height", 16))).save(path)
    report = validate(tmp_path / "rows.jsonl", progress=False)
    assert report.ok and report.rows == len(rows), report.problems


def test_columns_of_any_name(converted):
    _, (first, second) = converted("jsonl", fields=COLUMNS, image_prefix="train/")
    known = {"id": "q1", "images": ["train/a.png"], "question": "How many?", "answer": "3"}
    assert first == known | {"answer_type": "number", "level": "easy"}
    known = {"id": "q2", "images": ["train/b.png"], "question": "Which?", "answer": "B"}
    assert second == known | {"answer_type": "choice", "choices": ["cat", "dog"], "level": "hard"}
    with pytest.raises(UserError, match=r"jsonl.jsonl:1: the columns .*--map question=problem"):
        converted("jsonl")
    with pytest.raises(UserError, match=r"jsonl.jsonl:1: no column `query`"):
        converted("jsonl", fields={"question": "query"})


@pytest.mark.parametrize(
    "box_format, box", [("xywh", [2.0, 3.0, 10.0, 12.0]), ("xyxy", [2.0, 3.0, 8.0, 9.0])]
)
def test_box_format(converted, tmp_path, box_format, box):
    (tmp_path / "r.jsonl").write_text('{"image": "a.png", "bbox": [2, 3, 8, 9], "sent": "it"}\n')
    _, (row,) = converted("rec", tmp_path / "r.jsonl", box_format=box_format)
    assert row["box"] == box and row["width"] == 20


@pytest.mark.parametrize(
    ("name", "path", "new", "message"),
    [
        ("tabmwp", ["23", "answer"], "Wolves", r"tabmwp.json:23: field `answer`: 'Wolves' is none of the choices"),
        ("tabmwp", ["17", "question"], None, r"tabmwp.json:17: no field `question`"),
        ("chartqa", [1, "imgname"], None, r"chartqa.json:2: no field `imgname`"),
        ("chartqa", [0, "query"], None, r"chartqa.json:1: no field `query`"),
        ("chartqa", [2, "label"], " ", r"chartqa.json:3: field `label` is empty"),
        ("clevr_math", [1, "answer"], "many", r"clevr_math.json:2: field `answer`: expected a whole number"),
        ("geoqa", [0, "answer"], "E", r"geoqa.json:1: field `answer`: expected a letter from A to D, found 'E'"),
        ("geoqa", [1, "choices"], "abc", r"geoqa.json:2: field `choices`: expected list"),
        ("easy_vqa", [0, 2], "0", r"easy_vqa.json:1: field `image`: expected int, found '0'"),
        ("easy_vqa", [1, 2], None, r"easy_vqa.json:2: expected \[question, answer, number of the image\]"),
        ("coco", ["annotations", 2, "bbox"], [1, 2, 3], r"annotations\[3\]: field `bbox`: expected four numbers"),
        ("coco", ["annotations", 0, "image_id"], 77, r"annotations\[1\]: field `image_id`: there is no 77"),
        ("coco", ["categories"], None, r"coco.json: no `categories` in the file"),
        ("coco", ["images", 1, "width"], 0, r"images\[2\]: image of 0 x 80 pixels"),
        ("sc_tune", [0, "bbox"], [10, 20, 50, 100], r"2 of 2 boxes have nothing .*sc_tune.json:1: \[10.0, 20.0"),
        ("refcoco", [1, "ann_id"], 5, r"refcoco.json:2: field `ann_id`: there is no 5"),
        ("refcoco", [0, "sentences"], [{}], r"refcoco.json:1: field `sentences`: expected expressions"),
    ],
)  # fmt: skip
def test_errors_name_file_row_and_field(name, path, new, message, converted, tmp_path):
    value = part = json.loads(fixture(name).read_text())
    for key in path[:-1]:
        part = part[key]
    if new is None:
        del part[path[-1]]
    else:
        part[path[-1]] = new
    source = tmp_path / fixture(name).name
    source.write_text(json.dumps(value))
    with pytest.raises(UserError, match=message):
        converted(name, source)
    assert not (tmp_path / "rows.jsonl").exists()


def test_captions_of_mdetrs_referring_files_are_the_expressions(converted, tmp_path):
    value = json.loads(fixture("coco").read_text())
    value["images"][0]["caption"] = "the green stuff"
    (tmp_path / "c.json").write_text(json.dumps(value))
    _, (captioned, other) = converted("coco", tmp_path / "c.json")
    assert captioned == EXPECTED["coco"][0] | {"expressions": ["the green stuff"]}
    assert other == EXPECTED["coco"][1]


def test_one_split_of_the_refs(converted):
    assert converted("refcoco", split="val")[1] == EXPECTED["refcoco"][1:]


def test_refcoco_needs_its_boxes(tmp_path):
    with pytest.raises(UserError, match="--annotations"):
        convert(fixture("refcoco"), tmp_path / "o.jsonl", "refcoco")


def test_order_of_the_parts_of_a_detection_file_does_not_matter(converted, tmp_path):
    parts = list(json.loads(fixture("coco").read_text()).items())
    for seed in range(4):
        random.Random(seed).shuffle(parts)
        (tmp_path / "c.json").write_text(json.dumps(dict(parts)))
        assert converted("coco", tmp_path / "c.json")[1] == EXPECTED["coco"]


@pytest.mark.parametrize(
    ("answer", "kind"),
    [("14", "number"), ("-3.5%", "number"), ("$1,200", "number"), (".5", "number"), ("Yes", "yes_no"), ("2010s", "text"),
     ("10:15", "text"), ("-", "text"), ("1,2", "text")],
)  # fmt: skip
def test_answer_types(answer, kind):
    assert answer_type(answer) == kind


# --- Writing ---

TALK = [{"from": "human", "value": "<image>\né"}, {"from": "gpt", "value": "A <SPAN> x </CN>"}]
LLAVA = [{"id": i, "image": "a.png", "conversations": TALK} for i in range(5)]


def without_source(rows):
    return [{k: v for k, v in row.items() if k != "source"} for row in rows]


@pytest.mark.parametrize("format", ["llava", "reverse"])
def test_converted_rows_read_the_same(tmp_path, format):
    source, target = tmp_path / "a.json", tmp_path / "out" / "b.jsonl"
    source.write_text(json.dumps(LLAVA))
    assert convert(source, target, format) == {"rows": 5, "notes": {}}
    assert without_source(read_rows(target)) == without_source(read_rows(source))
    assert convert(target, tmp_path / "c.jsonl", "trl")["rows"] == 5
    assert (tmp_path / "c.jsonl").read_text() == target.read_text()


def test_failure_keeps_the_old_target(tmp_path):
    source, target = tmp_path / "a.json", tmp_path / "b.jsonl"
    source.write_text(json.dumps(LLAVA)[:-30])
    target.write_text("old")
    with pytest.raises(UserError, match="truncated"):
        convert(source, target)
    assert target.read_text() == "old" and {p.name for p in tmp_path.iterdir()} == {"a.json", "b.jsonl"}


def test_wrong_format(tmp_path):
    source = tmp_path / "a.json"
    source.write_text(json.dumps(LLAVA))
    with pytest.raises(UserError, match=r"a.json:1.*not the format 'trl'"):
        convert(source, tmp_path / "b.jsonl", "trl")
    with pytest.raises(UserError, match="Unknown format"):
        convert(source, tmp_path / "b.jsonl", "yolo")
    with pytest.raises(UserError, match="same file"):
        convert(source, source)
