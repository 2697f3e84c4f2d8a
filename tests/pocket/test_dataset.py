import json

import pytest
from json_lines import read_lines
from PIL import Image

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.pocket.dataset import build_world

SIZES = {"train": 12, "val": 6, "test": 6}


def test_the_world_on_disk_is_complete_and_reproducible(tmp_path):
    first, second = (build_world(tmp_path / name, seed=3, sizes=SIZES) for name in "ab")
    for path in sorted(first.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (second / path.relative_to(first)).read_bytes(), path.name
    truth = {row["image"]: row for row in map(json.loads, (first / "objects.jsonl").read_text().splitlines())}
    assert len(truth) == 24
    for row in json.loads((first / "train_captions.json").read_text()):
        assert Image.open(first / row["image"]).size == (128, 128)
        assert row["conversations"][0]["value"].startswith("<image>\n")
    for row in map(json.loads, (first / "test_captions.jsonl").read_text().splitlines()):
        assert row["objects"] == [item["noun"] for item in truth[row["images"][0]]["objects"]]
    answers = read_lines(first / "test_yesno.jsonl")
    for row in answers:
        noun = row["question"].rstrip("?").split()[-1]
        there = noun in [item["noun"] for item in truth[row["images"][0]]["objects"]]
        assert row["answer"] == ("yes" if there else "no")


def test_another_world_in_the_same_folder_is_refused(tmp_path):
    build_world(tmp_path, seed=1, sizes=SIZES)
    build_world(tmp_path, seed=1, sizes=SIZES)
    with pytest.raises(UserError, match="other settings"):
        build_world(tmp_path, seed=2, sizes=SIZES)
