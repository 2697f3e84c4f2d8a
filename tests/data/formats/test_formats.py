"""Every source format, from a file in its owner's schema to the rows that it must give."""

import json
import random
from pathlib import Path

import pytest
from PIL import Image

from vlm_sft_rl.data.convert import FORMATS, convert
from vlm_sft_rl.data.rows import read_rows
from vlm_sft_rl.data.sources.questions import answer_type
from vlm_sft_rl.data.validate import validate
from vlm_sft_rl.errors import UserError

FIXTURES = Path(__file__).parent / "fixtures"
PLANT = [1.08, 187.69, 612.67, 473.53]
CORNER = [90.0, 0.0, 100.0, 15.0]
QUESTIONS = {
    "tabmwp": [
        {
            "id": "8", "images": ["tables/8.png"], "question": "Look at the following schedule. When does the class end?",
            "split": "train", "grade": 3, "ques_type": "free_text", "ans_type": "other_text",
            "rationale": "Find Art.\nIt ends at 10:15 A.M.", "answer": "10:15 A.M.", "answer_type": "text",
        },
        {
            "id": "17", "images": ["tables/17.png"], "question": "How much more do beads cost than buttons?",
            "split": "train", "grade": 4, "unit": "$", "ques_type": "free_text", "ans_type": "decimal_number",
            "rationale": "Subtract.", "answer": "1,024.50", "answer_type": "number",
        },
        {
            "id": "23", "images": ["tables/23.png"], "question": "Which team won most games?",
            "split": "train", "grade": 2, "ques_type": "multi_choice", "ans_type": "extractive_text",
            "rationale": "Bears won 9.", "choices": ["Hawks", "Bears"], "answer": "B", "answer_type": "choice",
        },
    ],
    "chartqa": [
        {
            "id": "chartqa-1", "images": ["png/41699051005347.png"],
            "question": "How many food items are shown in the bar graph?", "answer": "14", "answer_type": "number",
        },
        {
            "id": "chartqa-2", "images": ["png/two_col_103.png"], "question": "Is the value of 2010 above 3%?",
            "answer": "Yes", "answer_type": "yes_no",
        },
        {
            "id": "chartqa-3", "images": ["png/two_col_103.png"], "question": "Which colour is Spain?",
            "answer": "light blue", "answer_type": "text",
        },
    ],
    "clevr_math": [
        {
            "id": "clevr_math-1", "images": ["clevr_math_imgs/CLEVR_train_000000.png"],
            "question": "Subtract all green blocks. How many objects are left?", "answer": "6", "answer_type": "number",
        },
        {
            "id": "clevr_math-2", "images": ["clevr_math_imgs/CLEVR_train_000001.png"],
            "question": "How many cubes must be added to get 10?", "answer": "3", "answer_type": "number",
        },
    ],
    "geoqa": [
        {
            "id": "train-0", "images": ["images/train-0.png"], "question": "As shown, AB ∥ CD and ∠1 = 50°. Then ∠2 = ?",
            "choices": ["40°", "50°", "130°", "140°"], "answer": "B", "answer_type": "choice",
        },
        {
            "id": "train-1", "images": ["images/train-1.png"], "question": "The radius is 2. The chord is ?",
            "choices": ["1", "2", "3", "4"], "answer": "D", "answer_type": "choice",
        },
    ],
    "m3cot": [
        {
            "id": "physical-commonsense-1426", "images": ["data/images/physical-commonsense-1426.png"],
            "question": "What is the person doing?", "domain": "commonsense", "topic": "physical-commonsense",
            "category": "physical-commonsense", "split": "train",
            "rationale": "A pan is visible.\nSo the person cooks.", "choices": ["cooking", "sleeping"], "answer": "A",
            "answer_type": "choice",
        },
        {
            "id": "grammar-1", "images": ["images/grammar-1.png"], "question": "Which word is a noun?",
            "context": "Think of things.", "domain": "science", "topic": "language-science", "category": "grammar",
            "split": "train", "rationale": "A desk is a thing.", "choices": ["run", "desk", "blue"], "answer": "B",
            "answer_type": "choice",
        },
    ],
}  # fmt: skip
REGIONS = {
    "coco": [
        {"id": "1038967", "image": "000000000009.jpg", "width": 640, "height": 480, "box": PLANT, "category": "broccoli"},
        {"id": "7", "image": "000000000025.jpg", "width": 100, "height": 80, "box": CORNER, "category": "person"},
    ],
    "objects365": [
        {
            "id": "1", "image": "images/v1/patch8/objects365_v1_00420917.jpg", "width": 600, "height": 400,
            "box": [499.84, 185.55, 530.34, 283.99], "category": "Lamp",
        },
        {
            "id": "2", "image": "images/v1/patch8/objects365_v1_00420917.jpg", "width": 600, "height": 400,
            "box": [10.0, 20.0, 40.0, 60.0], "category": "Person",
        },
    ],
    "refcoco": [
        {
            "id": "0", "image": "000000000009.jpg", "width": 640, "height": 480, "box": PLANT,
            "expressions": ["green stuff", "the broccoli"], "category": "broccoli", "split": "train",
        },
        {
            "id": "1", "image": "000000000025.jpg", "width": 100, "height": 80, "box": CORNER, "expressions": ["man"],
            "category": "person", "split": "val",
        },
    ],
    "rec": [
        {
            "id": "rec-1", "image": "train2014/COCO_train2014_000000000009.jpg", "width": 640, "height": 480, "box": PLANT,
            "expressions": ["green stuff"],
        },
        {
            "id": "x", "image": "a.png", "width": 20, "height": 16, "box": [2.0, 3.0, 10.0, 12.0],
            "expressions": ["the square", "a box"], "category": "square",
        },
    ],
    "sc_tune": [{"id": "a-1", "image": "a.png", "width": 20, "height": 16, "box": [2.0, 4.0, 10.0, 16.0]}],
}  # fmt: skip


def fixture(name: str) -> Path:
    return next(FIXTURES.glob(f"{name}.json*"))


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def convert_fixture(name, tmp_path, **options):
    options |= {"annotations": fixture("coco")} if name == "refcoco" else {}
    Image.new("RGB", (20, 16)).save(tmp_path / "a.png")
    report = convert(fixture(name), tmp_path / "rows.jsonl", name, **options)
    return report, rows_of(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("name", QUESTIONS | REGIONS)
def test_rows_are_as_expected(name, tmp_path):
    report, rows = convert_fixture(name, tmp_path)
    assert rows == (QUESTIONS | REGIONS)[name] and report["rows"] == len(rows)


def test_what_is_left_out_is_counted(tmp_path):
    assert convert_fixture("coco", tmp_path)[0]["notes"] == {
        "boxes of a crowd left out": 1,
        "boxes clipped to the image": 1,
        "boxes without area left out": 1,
    }
    assert convert_fixture("llava_cot", tmp_path)[0]["notes"] == {"answers without the four stages": 1}
    assert convert_fixture("geoqa", tmp_path)[0]["notes"] == {}


@pytest.mark.parametrize("name", ["llava", "reverse", "llava_cot"])
def test_conversations_keep_every_turn(name, tmp_path):
    _, rows = convert_fixture(name, tmp_path)
    source = list(read_rows(fixture(name)))
    assert [{k: v for k, v in row.items() if k != "source"} for row in source] == rows
    if name == "reverse":
        assert rows[0]["messages"][1]["hint"] == "a red blender"


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("trl", "hf")])
def test_what_is_written_validates(name, tmp_path):
    options = {"fields": {"question": "problem", "answer": "solution", "image": "picture", "id": "uid"}}
    _, rows = convert_fixture(name, tmp_path, **(options if name == "jsonl" else {}))
    for row in rows:
        for image in [*row.get("images", []), *([row["image"]] if "image" in row else [])]:
            path = tmp_path / image
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (row.get("width", 20), row.get("height", 16))).save(path)
    report = validate(tmp_path / "rows.jsonl", progress=False)
    assert report.ok and report.rows == len(rows), report.problems


def test_columns_of_any_name(tmp_path):
    fields = {"question": "problem", "answer": "solution", "images": "picture", "id": "uid"}
    _, rows = convert_fixture("jsonl", tmp_path, fields=fields, image_prefix="train/")
    assert rows == [
        {"id": "q1", "images": ["train/a.png"], "question": "How many?", "answer": "3", "answer_type": "number",
         "level": "easy"},
        {"id": "q2", "images": ["train/b.png"], "question": "Which?", "answer": "B", "answer_type": "choice",
         "choices": ["cat", "dog"], "level": "hard"},
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"jsonl.jsonl:1: the columns .*--map question=problem"):
        convert_fixture("jsonl", tmp_path)
    with pytest.raises(UserError, match=r"jsonl.jsonl:1: no column `query`"):
        convert_fixture("jsonl", tmp_path, fields={"question": "query"})


def test_box_format(tmp_path):
    (tmp_path / "r.jsonl").write_text(
        json.dumps({"image": "a.png", "bbox": [2, 3, 8, 9], "sent": "it"}) + "\n"
    )
    Image.new("RGB", (20, 16)).save(tmp_path / "a.png")
    for box_format, box in (("xywh", [2.0, 3.0, 10.0, 12.0]), ("xyxy", [2.0, 3.0, 8.0, 9.0])):
        convert(tmp_path / "r.jsonl", tmp_path / "o.jsonl", "rec", box_format=box_format)
        assert rows_of(tmp_path / "o.jsonl")[0]["box"] == box
        assert rows_of(tmp_path / "o.jsonl")[0]["width"] == 20


def change(value, path, new):
    for key in path[:-1]:
        value = value[key]
    if new is None:
        del value[path[-1]]
    else:
        value[path[-1]] = new


@pytest.mark.parametrize(
    ("name", "path", "new", "message"),
    [
        ("tabmwp", ["23", "answer"], "Wolves", r"tabmwp.json:23: field `answer`: 'Wolves' is none of the choices"),
        ("tabmwp", ["17", "question"], None, r"tabmwp.json:17: no field `question`"),
        ("chartqa", [1, "imgname"], None, r"chartqa.json:2: no field `imgname`"),
        ("chartqa", [2, "label"], " ", r"chartqa.json:3: field `label` is empty"),
        ("clevr_math", [1, "answer"], "many", r"clevr_math.json:2: field `answer`: expected a whole number"),
        ("geoqa", [0, "answer"], "E", r"geoqa.json:1: field `answer`: expected a letter from A to D, found 'E'"),
        ("geoqa", [1, "choices"], "abc", r"geoqa.json:2: field `choices`: expected list"),
        ("coco", ["annotations", 2, "bbox"], [1, 2, 3], r"annotations\[3\]: field `bbox`: expected four numbers"),
        ("coco", ["annotations", 0, "image_id"], 77, r"annotations\[1\]: field `image_id`: there is no 77"),
        ("coco", ["categories"], None, r"coco.json: no `categories` in the file"),
        ("coco", ["images", 1, "width"], 0, r"images\[2\]: image of 0 x 80 pixels"),
        ("sc_tune", [0, "bbox"], [10, 20, 50, 100], r"sc_tune.json:1: field `bbox`: expected four shares from 0 to 1"),
        ("refcoco", [1, "ann_id"], 5, r"refcoco.json:2: field `ann_id`: there is no 5"),
        ("refcoco", [0, "sentences"], [{}], r"refcoco.json:1: field `sentences`: expected expressions"),
    ],
)  # fmt: skip
def test_errors_name_file_row_and_field(name, path, new, message, tmp_path):
    value = json.loads(fixture(name).read_text())
    change(value, path, new)
    (tmp_path / fixture(name).name).write_text(json.dumps(value))
    with pytest.raises(UserError, match=message):
        convert(tmp_path / fixture(name).name, tmp_path / "o.jsonl", name, annotations=fixture("coco"))
    assert not (tmp_path / "o.jsonl").exists()


def test_captions_of_mdetrs_referring_files_are_the_expressions(tmp_path):
    value = json.loads(fixture("coco").read_text())
    value["images"][0]["caption"] = "the green stuff"
    (tmp_path / "c.json").write_text(json.dumps(value))
    convert(tmp_path / "c.json", tmp_path / "o.jsonl", "coco")
    one, other = rows_of(tmp_path / "o.jsonl")
    assert one == REGIONS["coco"][0] | {"expressions": ["the green stuff"]} and other == REGIONS["coco"][1]


def test_one_split_of_the_refs(tmp_path):
    _, rows = convert_fixture("refcoco", tmp_path, split="val")
    assert rows == REGIONS["refcoco"][1:]


def test_refcoco_needs_its_boxes(tmp_path):
    with pytest.raises(UserError, match="--annotations"):
        convert(fixture("refcoco"), tmp_path / "o.jsonl", "refcoco")


def test_order_of_the_parts_of_a_detection_file_does_not_matter(tmp_path):
    value = json.loads(fixture("coco").read_text())
    expected = REGIONS["coco"]
    for seed in range(4):
        parts = list(value.items())
        random.Random(seed).shuffle(parts)
        (tmp_path / "c.json").write_text(json.dumps(dict(parts)))
        convert(tmp_path / "c.json", tmp_path / "o.jsonl", "coco")
        assert rows_of(tmp_path / "o.jsonl") == expected


@pytest.mark.parametrize(
    ("answer", "kind"),
    [("14", "number"), ("-3.5%", "number"), ("$1,200", "number"), (".5", "number"), ("Yes", "yes_no"), ("2010s", "text"),
     ("10:15", "text"), ("-", "text"), ("1,2", "text")],
)  # fmt: skip
def test_answer_types(answer, kind):
    assert answer_type(answer) == kind
