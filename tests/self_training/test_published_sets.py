"""The paper's data sets, from their owners' files to a loop that is ready to start, as docs/r3v.md has it."""

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from vlm_sft_rl import recipes
from vlm_sft_rl.cli.app import app
from vlm_sft_rl.graders import load_grader
from vlm_sft_rl.self_train import training_keys
from vlm_sft_rl.self_training.loop import SelfTraining
from vlm_sft_rl.self_training.rounds import read_rows
from vlm_sft_rl.train import parse

GUIDE = (Path(__file__).parents[2] / "docs/r3v.md").read_text(encoding="utf-8")
CONVERSIONS = re.findall(r"^vlm-sft-rl (data convert .*)$", GUIDE, re.MULTILINE)
RECIPES = [name for name in recipes.names("recipes") if name.startswith("r3v/") and name != "r3v/pocket"]
SETS = ("tabmwp", "chartqa", "clevr_math", "geoqa")


def tabmwp(split):
    free = {"question": "How many?", "choices": None, "answer": "1,024.50", "unit": "$", "solution": "Add."}
    choice = {"question": "Which team?", "choices": ["Hawks", "Bears"], "answer": "Bears", "unit": None}
    rows = {f"{split}1": free | {"ans_type": "decimal_number"}, f"{split}2": choice}
    return f"problems_{split}.json", rows, [f"tables/{pid}.png" for pid in rows]


def chartqa(split):
    rows = [{"imgname": "a.png", "query": "What share?", "label": "57%"}]
    rows += [{"imgname": "a.png", "query": "Which colour?", "label": "light blue"}]
    return f"{split}/{split}_human.json", rows, [f"{split}/png/a.png"]


def clevr_math(split):
    rows = [{"filename": f"{split}.png", "question": "How many are left?", "answer": 6}]
    return f"clevr_{split}.json", rows, [f"clevr_math_imgs/{split}.png"]


def geoqa(split):
    row = {"id": f"{split}-0", "question": "Then ∠2 = ?", "choices": ["40°", "50°", "130°"], "answer": "B"}
    return f"published/{split}.jsonl", [row], [f"images/{split}-0.png"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """`data/SET/{train,test}.jsonl` for all sets, made by the guide's commands."""
    folder = tmp_path_factory.mktemp("published")
    for number, publish in enumerate((tabmwp, chartqa, clevr_math, geoqa)):
        for split in ("train", "test"):
            name, rows, images = publish(split)
            home = folder / "data" / publish.__name__
            for path in (home / name, *(home / image for image in images)):
                path.parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text(json.dumps(rows))
            for image in images:
                Image.new("RGB", (28, 28), (50 * number, 90, 10)).save(home / image)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in CONVERSIONS:
            result = CliRunner().invoke(app, shlex.split(command))
            assert result.exit_code == 0, (command, result.output)
    for name in SETS:
        rows = read_rows(folder / "data" / name / "train.jsonl")
        lines = [json.dumps(row | {"rationale": f"I see.\nAnswer: {row['answer']}"}) for row in rows]
        (folder / "data" / name / "warmup.jsonl").write_text("\n".join(lines))
    return folder


def advised_overrides(recipe: str) -> str:
    """The words a recipe's header gives for the other sets, for a set `D`."""
    header = [line.lstrip("# ") for line in recipes.find("recipes", recipe).read_text().splitlines()]
    first = next(i for i, line in enumerate(header) if line.startswith("--dataset D"))
    last = next(i for i, line in enumerate(header) if line.startswith("D  "))
    return " ".join(line.rstrip("\\") for line in header[first:last])


@pytest.mark.parametrize("recipe", RECIPES)
def test_star_and_dpo_has_settings_in_every_recipe(recipe):
    path = recipes.find("recipes", recipe)
    keys = recipes.load_recipe(path)
    _, _, config = parse(keys, ["--variant", "star_dpo", "--bf16", "false"], recipe)
    found = training_keys(keys, config, recipe)["dpo"]
    _, _, args = parse({"method": "reflection_dpo", **found, "output_dir": "o"}, ["--bf16", "false"], recipe)
    assert config.uses_dpo and args.learning_rate == 1e-5 and args.beta == 0.1


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_takes_every_set_by_the_words_of_its_header(data, monkeypatch, recipe, name):
    monkeypatch.chdir(data)
    words = re.sub(r"\bD\b", name, advised_overrides(recipe)).split()
    keys = recipes.load_recipe(recipes.find("recipes", recipe))
    _, data_args, config = parse(keys, [*words, "--bf16", "false"], recipe)
    config.max_row_tokens = None  # would need the recipe's tokenizer
    run = SelfTraining(config, None, "BASE", data / "run", data_args.image_root)
    assert config.dataset == name
    assert len(run.train) == len(run.test) == (2 if name in ("tabmwp", "chartqa") else 1)
    assert len(run.warmup) == (len(run.train) if config.start == "warmup" else 0)
    # what is taught as right is right to both graders, in the form the prompt asks for
    targets = [row["messages"][-1]["content"] for row in run.mixture(0).rows]
    assert len(targets) == len(run.train) + len(run.warmup)
    for rules in ("ours", "released"):
        for question in (*run.train, *run.test):
            grade = load_grader(name, rules)
            for output in (question["answer"], run.prompts.selected(question["answer"])):
                assert grade(output, question).correct, (rules, output, question)
            if "choices" in question:
                assert "letter only" in run.prompts.ask_directly(question) and question["answer"] == "B"
