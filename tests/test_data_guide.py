"""docs/data.md: its commands run, and it names every format."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from vlm_sft_rl import recipes
from vlm_sft_rl.cli.app import app
from vlm_sft_rl.data.convert import FORMATS
from vlm_sft_rl.train import parse

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests/data/formats/fixtures"
GUIDE = (ROOT / "docs/data.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line) for line in re.findall(r"^vlm-sft-rl (data convert .*)$", GUIDE, re.MULTILINE)]


def format_of(words):
    return words[words.index("--format") + 1]


def test_every_format_has_its_command_and_its_place_in_the_table_and_in_the_help():
    assert [format_of(words) for words in COMMANDS] == list(FORMATS)
    table = GUIDE[GUIDE.index("| format |") :]
    assert all(f"`{name}`" in table for name in FORMATS)
    text = CliRunner().invoke(app, ["data", "convert", "--help"], env={"COLUMNS": "200"}).output
    listed = re.sub(r"[│\s]+", " ", text)
    assert all(re.search(rf"\b{name}\b", listed) for name in FORMATS)


@pytest.mark.parametrize("words", [w for w in COMMANDS if format_of(w) not in ("trl", "hf")], ids=format_of)
def test_the_commands_run(words, tmp_path):
    source = next(FIXTURES.glob(f"{format_of(words)}.json*"))
    target = tmp_path / "out/rows.jsonl"
    for i, word in enumerate(words):
        if word == "instances.json":
            words = [*words[:i], str(FIXTURES / "coco.json"), *words[i + 1 :]]
    local = tmp_path / source.name
    local.write_bytes(source.read_bytes())
    Image.new("RGB", (20, 16)).save(tmp_path / "a.png")
    result = CliRunner().invoke(app, ["data", "convert", str(local), str(target), *words[4:]])
    assert result.exit_code == 0, result.output
    assert len(target.read_text().splitlines()) > 0 and "rows: " in result.output


@pytest.mark.parametrize("name", ["data.md", "bring_your_own_model.md"])
def test_the_commands_that_train_parse(name):
    text = (ROOT / "docs" / name).read_text(encoding="utf-8").replace("RECIPE", "reverse/llava_1_5_7b_lora")
    lines = [
        shlex.split(line.replace("--dry-run", ""), comments=True)
        for line in re.findall(r"^vlm-sft-rl (?:self-)?(train .*)$", text, re.MULTILINE)
    ]
    assert len(lines) >= 2
    for _, recipe, *words in lines:
        loaded = recipes.load_recipe(recipes.find("recipes", recipe))
        *_, data, args = parse(loaded, [*words, "--bf16", "false"], recipe)
        # rows of one's own are named, and where their images are; those of a Hub dataset hold them
        if data.dataset_name is not None:
            assert data.dataset_name in words
            continue
        named = args.train_questions if loaded["method"] == "r3v" else data.train_file
        assert named in words and "--image_root" in words
        if loaded["method"] == "r3v":
            args.check_self_training()


def test_tag_from_the_command_line(tmp_path):
    (tmp_path / "plain.jsonl").write_text(
        '{"id": "a", "question": "Describe it.", "answer": "A dog on the sofa."}\n'
        '{"id": "b", "question": "Is it red?", "answer": "No"}\n'
    )
    (tmp_path / "nouns.txt").write_text("dog\nsofa\n")
    words = [
        "data",
        "tag",
        str(tmp_path / "plain.jsonl"),
        str(tmp_path / "t.jsonl"),
        "--nouns",
        str(tmp_path / "nouns.txt"),
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "2 positive and 1 negative rows" in " ".join(result.output.split())
    assert "<SPAN> A dog </CN> <SPAN> on the sofa </CN>." in (tmp_path / "t.jsonl").read_text()
