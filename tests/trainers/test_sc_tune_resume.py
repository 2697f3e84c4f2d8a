"""Killed at any moment and started again, a run ends with the weights of one that was never disturbed."""

import random
import signal
import time
from pathlib import Path

import families
import pytest
import torch
from regions import caption_rows, region_rows
from safetensors.torch import load_file
from training import ended, finish, recipe_of, start

from vlm_sft_rl.io import write_jsonl

SETTINGS = {
    "box_convention": "llava",
    "describer_steps": 3,
    "locator_steps": 2,
    "max_steps": 12,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "num_generations": 2,
    "locator_learning_rate": 2e-3,
    "kl_coef": 0.05,
    "replay_share": 0.5,
    "describe_max_new_tokens": 5,
    "locate_max_new_tokens": 6,
    "min_new_tokens": 1,
    "rewards": ["giou", "length"],
    "reward_weights": [1.0, 0.1],
    "per_device_train_batch_size": 4,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("regions")
    families.save(*families.llava(), folder / "model")
    rows = region_rows(20)
    for row in rows:
        name = f"{row['id']}.png"
        row["image"].save(folder / name)
        row["image"] = name
    captions = caption_rows(10)
    for caption, row in zip(captions, rows, strict=False):
        caption["images"] = [row["image"]]
    write_jsonl(folder / "replay.jsonl", captions)
    return recipe_of(folder, "sc_tune", rows, replay_file=str(folder / "replay.jsonl"), **SETTINGS)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("anchor", ["frozen", "start"])
def test_killed_at_random_and_resumed_is_the_run_that_was_never_killed(world, tmp_path, anchor):
    finish(start(world, tmp_path / "whole", kl_anchor=anchor))
    rng, kills = random.Random(anchor), 0
    output = tmp_path / "killed"
    # each run is allowed at least one more checkpoint, then dies at a random moment after it
    for wanted in (2, 6, 8):
        process = start(world, output, kl_anchor=anchor)
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if any(int(p.name.split("-")[1]) >= wanted for p in output.glob("checkpoint-*")):
                time.sleep(rng.random() * 0.5)
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.02)
        ended(process)
    said = finish(start(world, output, kl_anchor=anchor))
    assert kills >= 1 and "Going on from" in said
    whole, resumed = weights(tmp_path / "whole"), weights(output)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(world, tmp_path):
    exact = {"optim": "sgd", "max_steps": 6}
    finish(start(world, tmp_path / "one", **exact))
    finish(start(world, tmp_path / "two", per_device_train_batch_size=2, processes=2, **exact))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    before = weights(Path(world["model_name_or_path"]))
    assert any(not torch.equal(before[name], one[name]) for name in one)
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-6, rtol=1e-4)
