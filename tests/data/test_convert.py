import json

import pytest
from test_rows import turns

from vlm_sft_rl.data.convert import convert
from vlm_sft_rl.data.rows import read_rows
from vlm_sft_rl.errors import UserError

LLAVA = [
    {"id": i, "image": "a.png", "conversations": turns("<image>\né", "A <SPAN> x </CN>")} for i in range(5)
]


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
