"""A row is right for all or for nobody: `data validate` and whoever reads a kind of row come to the same verdict."""

import copy
import json
import math

import pytest
import templates
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_sft_rl.data.collators import PreferenceCollator, RegionCollator, VisionCollator
from vlm_sft_rl.data.corrections import superseded_mark
from vlm_sft_rl.data.images import open_image
from vlm_sft_rl.data.index import load_train_rows
from vlm_sft_rl.data.marks import verification_marks
from vlm_sft_rl.data.rows import read_pairs, read_regions
from vlm_sft_rl.data.validate import WITHOUT_ANSWER, validate
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.self_training.pool import read_questions

PROCESSOR = templates.processor("vicuna", "bpe")
MARKS = [*verification_marks(PROCESSOR.tokenizer), superseded_mark]


def said(role, content, **more):
    return {"role": role, "content": content, **more}


TYPED = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
ROWS = {
    "SFT": [
        {
            "id": "s",
            "images": ["a.png"],
            "system": "Be brief.",
            "messages": [
                said("user", TYPED),
                said("assistant", "A <SPAN> cat </CN>.", weight=1, hint="dog", answer_type="general_answer"),
                said("user", "Sure?"),
                said("assistant", "Yes.", loss=False),
            ],
        },
        {
            "id": 3,
            "image": {"path": "a.png", "bytes": None},
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?"},
                {"from": "gpt", "value": "A cat."},
            ],
        },
        {"images": "a.png", "prompt": "What?", "completion": "A cat."},
        {
            "id": "c",
            "images": ["a.png"],
            "messages": [
                said("user", "What?"),
                said("assistant", "A dog.", answer_type="attempt", weight=0),
                said("user", "Check."),
                said("assistant", "A cat.", answer_type="correction", supervise="all"),
            ],
        },
    ],
    "preference": [
        {
            "id": "p",
            "image": "a.png",
            "prompt": "What?",
            "chosen": "A cat.",
            "rejected": "A dog.",
            "pair_kind": "cot",
            "pair_weight": 0.5,
        },
        {
            "prompt": [
                said("system", "Be brief."),
                said("user", [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]),
                said("assistant", "A bird?"),
                said("user", "No."),
            ],
            "chosen": [said("assistant", "A cat.")],
            "rejected": [said("assistant", [{"type": "text", "text": "A dog."}])],
        },
        {
            "images": ["a.png"],
            "chosen": [said("user", "What?"), said("assistant", "A cat.")],
            "rejected": [said("user", "What?"), said("assistant", "A dog.")],
        },
    ],
    "question": [
        {"id": "q", "image": "a.png", "question": "What?", "choices": ["cat", "dog"], "answer": "B"},
        {
            "id": 7,
            "images": ["a.png"],
            "question": "<image> How many?",
            "answer": 2,
            "unit": "cats",
            "rationale": "I count.",
        },
    ],
    "region": [
        {
            "id": "r",
            "image": "a.png",
            "width": 20,
            "height": 16,
            "box": [1, 2, 18, 12.5],
            "expressions": ["it"],
        },
        {"id": 1, "images": ["a.png"], "width": 20.0, "height": 16, "box": [0, 0, 20, 16], "category": "cat"},
    ],
}
VALUES = st.sampled_from(
    [
        *(
            None,
            "",
            " ",
            "x",
            "A",
            "<image>",
            "<SPAN> x",
            "a.png",
            "b.png",
            "../a.png",
            "http://x/a.png",
            "\x00",
        ),
        *("user", "cat", 0, 1, -1, 2, True, False, 0.5, math.nan, math.inf, -math.inf, 10**20, 10**400),
        *(
            [],
            {},
            [None],
            ["a.png"],
            ["a.png", "b.png"],
            [["a.png"]],
            [1, 2, 3, 4],
            ["x", "y"],
            {"path": "a.png"},
        ),
        *(
            {"bytes": "iVBORw0KGgo="},
            {"bytes": [137, 80]},
            {"bytes": None, "path": None},
            [{"type": "text"}],
            TYPED,
        ),
        *([said("user", "x")], [said("assistant", "x")], [said("user", "x"), said("assistant", "y")]),
    ]
)
NAMES = st.sampled_from(
    [
        "image",
        "images",
        "imgs",
        "img",
        "Image",
        "image_path",
        "image_url",
        "videos",
        "audio",
        "picture",
        "pixel_values",
        "id",
        "question_id",
        "question",
        "answer",
        "choices",
        "messages",
        "conversations",
        "prompt",
        "completion",
        "chosen",
        "rejected",
        "box",
        "width",
        "height",
        "system",
        "tools",
        "loss",
        "weight",
        "hint",
        "supervise",
        "from",
        "role",
        "value",
        "content",
        "answer_type",
        "A_type",
        "unit",
        "note",
        "type",
        "text",
        "path",
        "url",
        "pair_weight",
        "expressions",
    ]
)


def places(value, path=()):
    """Every place of a JSON value, as the keys that lead to it."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def mutate(row, draw):
    """Change, remove, rename or add one thing somewhere in the row."""
    *way, last = draw(st.sampled_from(list(places(row))))
    parent = row
    for key in way:
        parent = parent[key]
    act = draw(st.sampled_from(["set", "set", "remove", "rename", "add"]))
    if act == "set":
        parent[last] = copy.deepcopy(draw(VALUES))
    elif act == "remove":
        del parent[last]
    elif isinstance(parent, dict):
        parent[draw(NAMES)] = parent.pop(last) if act == "rename" else copy.deepcopy(draw(VALUES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows")
    Image.new("RGB", (20, 16)).save(path / "a.png")
    return path


def use_sft(path, root):
    collator = VisionCollator(PROCESSOR, root, marks=MARKS)
    for row in load_train_rows(path, root):
        collator([row])


def use_pairs(path, root):
    collator = PreferenceCollator(PROCESSOR, image_root=root)
    for row in read_pairs(path):
        collator([row])


def use_questions(path, root):
    for row in read_questions(path, root):
        for image in row["images"]:
            open_image(image, root)


def use_regions(path, root):
    RegionCollator(root)(read_regions(path))


READERS = {"SFT": use_sft, "preference": use_pairs, "question": use_questions, "region": use_regions}


def verdicts(kind, row, folder):
    """Whether `validate` and the reader take a row; and what each says."""
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    report = validate(path, PROCESSOR, progress=False)
    try:
        READERS[kind](path, folder)
        complaint = None
    except UserError as error:
        complaint = str(error)
    return report, complaint


CASES = [(kind, number) for kind, rows in ROWS.items() for number in range(len(rows))]


@pytest.mark.parametrize(("kind", "number"), CASES)
def test_valid_rows_are_taken_by_both(kind, number, folder):
    report, complaint = verdicts(kind, ROWS[kind][number], folder)
    assert report.ok and complaint is None, (report.problems, complaint)
    assert report.kinds == {kind: 1}


@pytest.mark.parametrize("kind", ROWS)
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_one_verdict_for_rows_that_were_changed_at_random(kind, folder, data):
    row = copy.deepcopy(data.draw(st.sampled_from(ROWS[kind])))
    for _ in range(data.draw(st.integers(1, 2))):
        mutate(row, data.draw)
    if not row:
        return
    report, complaint = verdicts(kind, row, folder)
    if kind in report.kinds and not report.notes[WITHOUT_ANSWER]:
        assert report.ok == (complaint is None), (row, report.problems, complaint)
    else:  # a row of another kind may be a good one, for others
        assert complaint is not None
