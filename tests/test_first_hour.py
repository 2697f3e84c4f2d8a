"""What a newcomer types first: versions, recipes, benchmarks; and what these commands cost."""

import json
import re
import resource
import shlex
import subprocess
import sys

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

import vlm_sft_rl
from vlm_sft_rl.cli.app import app
from vlm_sft_rl.cli.common import ALONE
from vlm_sft_rl.demos.frame import BASE
from vlm_sft_rl.errors import next_steps
from vlm_sft_rl.evaluation.decoders import DECODERS
from vlm_sft_rl.recipes import find, header, names, read_yaml


def call(*words):
    result = CliRunner().invoke(app, list(map(str, words)))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def seconds(code):
    """CPU seconds of a fresh process, which other load does not change; the least of three."""
    measured = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        measured.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return min(measured)


def test_the_package_and_its_help_start_at_once():
    nothing = seconds("")
    assert seconds("import vlm_sft_rl") - nothing < 0.05
    # 0.35 on the machine that this was written on; torch alone takes seconds
    assert seconds("import vlm_sft_rl.cli.app as c; c.app(['--help'])") - nothing < 1.0


def test_version():
    assert call("--version").output == f"vlm-sft-rl {vlm_sft_rl.__version__}\n"


def test_the_environment_names_versions_devices_and_extras(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    lines = dict(line.removeprefix("- ").split(": ", 1) for line in call("env").output.splitlines())
    assert {"vlm-sft-rl", "Python", "system", "CPU", "torch", "transformers", "trl"} <= lines.keys()
    assert lines["OMP_NUM_THREADS"] == "1" and "spacy (extra tag)" in lines
    assert "hf_secret" not in str(lines) and not any("extra dev" in name for name in lines)


def test_a_torch_that_cannot_be_imported_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "cannot be imported" in call("env").output


@pytest.mark.parametrize("name", names("recipes"))
def test_a_recipe_says_what_it_trains_and_on_what(name):
    parts = header(find("recipes", name))
    assert {"title", "Hardware", "Data", "Launch"} <= parts.keys()
    assert "  " not in "".join(parts.values()) and "#" not in parts["title"]


def test_recipes_are_listed_by_a_word_of_their_names():
    output = call("recipes", "ls", "pocket").output
    for name in names("recipes"):
        assert (name in output) == ("pocket" in name)
    with pytest.raises(vlm_sft_rl.UserError, match="No recipe has 'pockets'"):
        call("recipes", "ls", "pockets")


def test_a_recipe_is_shown_as_it_is(tmp_path):
    shown = call("recipes", "show", "reverse/pocket")
    assert yaml.safe_load(shown.stdout) == read_yaml(find("recipes", "reverse/pocket"))
    assert "vlm-sft-rl train reverse/pocket" in shown.stderr


@pytest.mark.parametrize(("name", "command"), [("reverse/pocket", "train"), ("r3v/pocket", "self-train")])
def test_a_recipe_is_copied_once(name, command, tmp_path):
    target = tmp_path / "mine.yaml"
    said = call("recipes", "copy", name, target).stderr
    assert f"vlm-sft-rl {command} {target}" in said
    assert target.read_text() == find("recipes", name).read_text()
    with pytest.raises(vlm_sft_rl.UserError, match="exists already"):
        call("recipes", "copy", name, target)
    with pytest.raises(vlm_sft_rl.UserError, match=r"ends with \.yaml"):
        call("recipes", "copy", name, tmp_path / "mine")


def test_generate_lists_what_it_can_do(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    listed = call("generate", "--help").output
    assert "|".join(ALONE) in listed and "--fallback" not in listed
    output = call("eval", "ls").output
    for name, entry in DECODERS.items():
        line = next(line for line in output.splitlines() if f"│ {name} " in line)
        assert entry.help in line and ("not in `generate`" in line) == (name not in ALONE)


def test_a_command_can_be_pasted():
    steps = {"ask it": ("generate", "--model", "a folder/model"), "look": "open report.html"}
    assert next_steps(steps) == (
        "To ask it: vlm-sft-rl generate --model 'a folder/model'\nTo look: open report.html"
    )


def test_commands_end_with_what_they_wrote_and_what_to_type_next(tmp_path):
    """The first steps with data of one's own, each typed as the one before it proposed."""
    captions, objects, rows = (tmp_path / name for name in ("captions.json", "objects.jsonl", "rows.jsonl"))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    answers = ["There is a cat.", "There is a dog and a cat."]
    captions.write_text(
        json.dumps(
            [
                {"id": str(i), "image": "a.png", "question": "What?", "answer": a}
                for i, a in enumerate(answers)
            ]
        )
    )
    objects.write_text(json.dumps({"image": "a.png", "objects": ["cat", "dog"]}) + "\n")
    said = call("data", "convert", captions, rows, "--format", "jsonl")
    assert f"Written to {rows}" in said.stdout.replace("\n", "") and "rows: 2" in said.stdout
    assert "To check them: vlm-sft-rl data validate" in said.stderr
    words = shlex.split(said.stderr.splitlines()[-1].partition(": vlm-sft-rl ")[2])
    checked = call(*words[: words.index("--model")])
    assert checked.exit_code == 0 and "vlm-sft-rl recipes ls" in checked.stderr
    prepared = call("model", "prepare", BASE, tmp_path / "prepared")
    assert f"Written to {tmp_path / 'prepared'}" in prepared.stdout.replace("\n", "")
    assert f"vlm-sft-rl train RECIPE --model_name_or_path {tmp_path / 'prepared'}" in prepared.stderr
    for result in (said, checked, prepared):
        assert not re.search(r"[{}]|Path\(|<class|object at", result.output), result.output
