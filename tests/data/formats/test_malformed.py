"""Every format with files that are none: one message that names the file, never a traceback, never an empty target."""

import copy
import json
import os
import random
from pathlib import Path

import pytest
from PIL import Image

from vlm_sft_rl.cli.app import main
from vlm_sft_rl.data.convert import FORMATS, convert
from vlm_sft_rl.errors import UserError

FIXTURES = Path(__file__).parent / "fixtures"
JSON = [name for name in FORMATS if name != "hf"]
TALK = [{"role": "user", "content": "Describe."}, {"role": "assistant", "content": "A cup."}]
VALUES = [
    None, [], {}, "", "  ", 3, -1, 0, 2.5, float("nan"), float("inf"), 1e300, 10**30, True, False, "text", "a\x1b[31m\0b",
    "../../x", "/etc/hostname", "x" * 6000, ["a"], [[1, 2]], [None], {"a": 1}, {"bytes": "iVBORw0KGgo=", "path": None},
    {"bytes": [1, 2]}, "data:image/png;base64,iVBORw0KGgo=",
]  # fmt: skip


def good(name):
    """A valid file's value; a list is written an object a line where the owner does."""
    if name in ("trl", "jsonl"):
        rows = [{"id": "a", "images": ["a.png"], "messages": TALK}]
        more = [
            {
                "question": "Which?",
                "choices": ["a", "b"],
                "answer": 1,
                "image": "a.png",
                "bbox": [1, 2, 9, 12],
            }
        ]
        return rows + (more if name == "jsonl" else [])
    path = next(FIXTURES.glob(f"{name}.json*"))
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def run(name, tmp_path, text):
    source, target = tmp_path / "source.json", tmp_path / "out.jsonl"
    source.write_bytes(text if isinstance(text, bytes) else text.encode())
    Image.new("RGB", (20, 16)).save(tmp_path / "a.png")
    options = {"annotations": FIXTURES / "coco.json"} if name == "refcoco" else {}
    return convert(source, target, name, **options)


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " \n",
            "[]",
            "{}",
            "nothing",
            "null",
            "3",
            '"text"',
            "[1, 2]",
            "[null]",
            "[{}]",
            "{}\n{}\n",
            '{"a": 1}',
            "[{",
        ),
        *(b"\xff\xfe\0", b"PK\3\4", "[" * 5000),
    ],
)
def test_files_that_are_none(name, text, tmp_path):
    with pytest.raises(UserError, match=r"source\.json"):
        run(name, tmp_path, text)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("name", FORMATS)
def test_a_source_that_cannot_be_read(name, tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder/pipe.parquet")
    options = {"annotations": FIXTURES / "coco.json"} if name == "refcoco" else {}
    for source in ("none", "folder", "a" * 300):
        with pytest.raises(UserError, match=source):
            convert(tmp_path / source, tmp_path / "out.jsonl", name, **options)


@pytest.mark.parametrize("name", JSON)
def test_any_field_of_any_type_is_read_or_refused(name, tmp_path):
    value, draw = good(name), random.Random(name)
    assert run(name, tmp_path, json.dumps(value))["rows"] > 0
    for _ in range(40):
        text = json.dumps(changed(value, draw))
        try:
            assert run(name, tmp_path, text)["rows"] > 0
        except UserError as error:
            assert str(tmp_path) in str(error) and len(str(error)) < 1500
        else:
            written = (tmp_path / "out.jsonl").read_text()
            assert "NaN" not in written and '"nan"' not in written and "Infinity" not in written


def changed(value, draw):
    """A copy in which one value, at any depth, is another or is not there."""
    value = copy.deepcopy(value)
    part = value
    while True:
        keys = list(part) if isinstance(part, dict) else range(len(part))
        key = draw.choice(list(keys))
        if isinstance(part[key], dict | list) and part[key] and draw.random() < 0.8:
            part = part[key]
            continue
        if draw.random() < 0.1:
            del part[key]
        else:
            part[key] = draw.choice(VALUES)
        return value


@pytest.mark.parametrize("name", ["a\x07.jsonl", "none\x1b.jsonl"])
def test_names_with_control_characters_do_not_reach_the_terminal(tmp_path, name, monkeypatch, capfd):
    folder = tmp_path / "\x1b[31mred"
    folder.mkdir()
    row = {"id": "\x1b[1m", "image": "b\x1b[2J\0.png", "bbox": [1, 2, 3, 4], "sent": "it"}
    (folder / "a\x07.jsonl").write_text(json.dumps(row))
    words = [
        "vlm-sft-rl",
        "data",
        "convert",
        str(folder / name),
        str(tmp_path / "o.jsonl"),
        "--format",
        "rec",
    ]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit):
        main()
    printed = "".join(capfd.readouterr())
    assert "\\u001b[31mred" in printed and not set(printed) & set("\0\x07\x1b")
