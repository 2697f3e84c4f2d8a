"""docs/recipes.md: every recipe and command in it exists, makes steps of the published size, and has the header's memory."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from recipe_headers import advised_launch, estimate_of

from vlm_sft_rl import recipes
from vlm_sft_rl.decoding.config import RetrospectiveConfig
from vlm_sft_rl.evaluation.decoders import DECODERS
from vlm_sft_rl.train import parse

GUIDE = (Path(__file__).parents[1] / "docs/recipes.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^vlm-sft-rl (?:train|self-train) .*$", GUIDE, re.MULTILINE)
SHIPPED = [name for name in recipes.names("recipes") if "/pocket" not in name]


def test_every_recipe_has_its_place_and_every_name_its_file():
    named = set(
        re.findall(
            r"`((?:reverse|r3v|sco|sc_tune|verdicts|injected|rewind|mdpo|sentinel|chair_dpo)/\w+)`", GUIDE
        )
    )
    assert named == set(SHIPPED)
    specs = set(re.findall(r"vlm-sft-rl eval run (\w+)", GUIDE)) - {"SPEC"}
    assert specs <= set(recipes.names("eval"))
    assert set(re.findall(r"--decoder ([\w-]+)", GUIDE)) <= set(DECODERS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_parse_and_keep_the_rows_of_a_step(command):
    words = shlex.split(command)[1:]
    self_train, name, rest = words[0] == "self-train", words[1], words[2:]
    options = {"--accelerate-config": "single_gpu", "--num-processes": "1"}
    for option in options:
        if option in rest:
            place = rest.index(option)
            options[option] = rest[place + 1]
            rest = rest[:place] + rest[place + 2 :]
    assert recipes.find("accelerate_configs", options["--accelerate-config"])
    recipe = recipes.load_recipe(recipes.find("recipes", name))
    assert self_train == (recipe["method"] == "r3v")
    _, _, args = parse(recipe, [*rest, "--bf16", "false"], name)
    if self_train:
        args.check_self_training()
        assert args.sample_processes == int(options["--num-processes"])
    _, processes = advised_launch(name)
    published = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] * processes
    now = (
        args.per_device_train_batch_size * args.gradient_accumulation_steps * int(options["--num-processes"])
    )
    assert now == published


def test_the_decoding_settings_exist():
    found = re.findall(r"`retrospective: (\{.*?\})`", GUIDE)
    assert len(found) == 3
    for text in found:
        RetrospectiveConfig(**yaml.safe_load(text))


def test_the_memory_table_is_that_of_the_headers():
    rows = re.findall(
        r"^\| `(\w+/\w+)` \| (\d) \| (\w+) \| (\d+) x (\d+) \| ([\d.]+) \|$", GUIDE, re.MULTILINE
    )
    assert {row[0] for row in rows} == set(SHIPPED) and len(rows) == len(SHIPPED)
    for name, gpus, config, batch, tokens, total in rows:
        assert (config, int(gpus)) == advised_launch(name)
        assert (total, int(batch), int(tokens)) == estimate_of(name)
