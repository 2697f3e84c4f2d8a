"""Killed again and again at random moments, or resumed from any of its checkpoints, a run ends with the weights of one that
was never disturbed: every trainer but SC-Tune's, which has its own test."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import families
import pytest
import staged_world
import torch
from in_processes import correction_rows, preference_rows
from launched import command, launch
from safetensors.torch import load_file
from tagged_rows import prepared, write_rows
from training import ended, finish, recipe_of, start, written

from vlm_sft_rl.data.rows import read_rows
from vlm_sft_rl.train import last_complete_checkpoint, main

KILLS = 2
SETTINGS = {
    "max_steps": 12,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 3,
    "dataloader_num_workers": 1,
    "seed": 3,
}
# three epochs; every other checkpoint lies between two updates on the same answers
GRPO = {
    "max_steps": -1,
    "num_train_epochs": 3,
    "save_steps": 3,
    "num_iterations": 2,
    "num_generations": 2,
    "per_device_train_batch_size": 4,
    "max_completion_length": 16,
    "grader": "exact",
    "staged": False,
    "rewards": ["answer", "length"],
    "reward_weights": [1.0, 0.1],
}


def world(folder: Path, name: str) -> dict:
    """A recipe over files in `folder`."""
    method, lora = name.removesuffix(" LoRA"), name.endswith("LoRA")
    settings = {**SETTINGS, **({"use_peft": True, "lora_r": 4} if lora else {})}
    if method in ("reverse", "packed", "sft"):
        rows = [{**row, "source": None} for row in read_rows(write_rows(folder, count=16))]
        prepared(folder).rename(folder / "model")
        packing = {"vision_packing": "rows"} if method == "packed" else {}
        kind = "reverse" if method == "packed" else method
        return recipe_of(folder, kind, rows, **settings, **packing)
    families.save(*families.llava(), folder / "model")
    if method == "grpo":
        questions = staged_world.write_questions(folder, 8)
        return recipe_of(folder, method, [], **settings | GRPO) | {"train_file": str(questions)}
    rows = correction_rows() if method == "sco" else preference_rows()
    for number, row in enumerate(rows):
        row["images"][0].save(folder / f"{number}.png")
        row["images"] = [f"{number}.png"]
    return recipe_of(folder, method, rows, **settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "reverse",
        "packed",
        "sft",
        "sco LoRA",
        "reflection_dpo LoRA",
        "grpo",
    ],
)
def test_killed_at_random_moments_it_ends_as_if_it_never_was(tmp_path, name):
    recipe, output, rng = world(tmp_path, name), tmp_path / "killed", random.Random(name)
    finish(start(recipe, tmp_path / "whole"))
    kills = 0
    for _ in range(KILLS):
        before, process = last_complete_checkpoint(output)[0], start(recipe, output)
        # every run gets one checkpoint further at least, so that all end some time
        while process.poll() is None and last_complete_checkpoint(output)[0] == before:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.3)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        ended(process)
    said = finish(start(recipe, output))
    assert kills and "Going on from" in said
    print(f"{name}: {kills} kills")
    assert_same_weights(tmp_path / "whole", output)


def assert_same_weights(whole: Path, resumed: Path) -> None:
    (path,) = whole.glob("*model.safetensors")
    one, other = load_file(path), load_file(resumed / path.name)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def history(output: Path) -> list[dict]:
    """The log without what took how long."""
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    spent = ("runtime", "per_second", "step_time", "total_flos")
    return [{k: v for k, v in entry.items() if not any(word in k for word in spent)} for entry in log]


def resumed_from(step: int, whole: Path, output: Path) -> Path:
    """An output folder that has this checkpoint of a run alone."""
    shutil.copytree(whole / f"checkpoint-{step}", output / f"checkpoint-{step}")
    return output


# eight steps an epoch; what moves the reference moves it at every other step
@pytest.mark.parametrize(
    ("name", "settings", "steps"),
    [
        ("grpo", {}, [9, 18]),
        ("reverse", {"max_steps": 20, "logging_steps": 4}, [10]),
        ("grpo", {"steps_per_generation": 3, "gradient_accumulation_steps": 2}, [3]),
        ("reflection_dpo", {"sync_ref_model": True, "ref_model_sync_steps": 2}, [4]),
    ],
)
def test_from_any_checkpoint_it_is_the_run_that_wrote_it(tmp_path, name, settings, steps):
    recipe = world(tmp_path, name) | {"save_total_limit": 30, "dataloader_num_workers": 0, **settings}
    whole = tmp_path / "whole"
    assert main(["--config", written(recipe | {"output_dir": str(whole)}, tmp_path / "recipe")]) == 0
    if name == "grpo":
        assert any(entry.get("reward_std") for entry in history(whole))
    for step in steps:
        output = resumed_from(step, whole, tmp_path / str(step))
        assert main(["--config", written(recipe | {"output_dir": str(output)}, tmp_path / "recipe")]) == 0
        assert_same_weights(whole, output)
        assert history(output) == history(whole)


@pytest.mark.slow
def test_two_processes_find_their_rows_and_answers_again(tmp_path):
    recipe = world(tmp_path, "grpo") | {"save_total_limit": 30, "per_device_train_batch_size": 2}
    whole = tmp_path / "whole"
    launch(command(Path(written(recipe | {"output_dir": str(whole)}, tmp_path / "recipe")), processes=2))
    output = resumed_from(9, whole, tmp_path / "resumed")
    launch(command(Path(written(recipe | {"output_dir": str(output)}, tmp_path / "recipe")), processes=2))
    assert_same_weights(whole, output)
    assert history(output) == history(whole)
