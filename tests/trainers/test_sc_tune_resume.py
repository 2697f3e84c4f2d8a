"""Killed at any moment and started again, a run ends with the weights of one that was never disturbed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import families
import pytest
import torch
from regions import caption_rows, region_rows
from safetensors.torch import load_file

from vlm_sft_rl.io import write_jsonl

RUN = """
method: sc_tune
model_name_or_path: {folder}/model
dtype: float32
train_file: {folder}/regions.jsonl
image_root: {folder}
output_dir: {output}
box_convention: llava
describer_steps: 3
locator_steps: 2
max_steps: {steps}
save_steps: 2
save_total_limit: 2
num_generations: 2
learning_rate: 1.0e-3
locator_learning_rate: 2.0e-3
kl_coef: 0.05
kl_anchor: {anchor}
replay_file: {folder}/replay.jsonl
replay_share: 0.5
describe_max_new_tokens: 5
locate_max_new_tokens: 6
min_new_tokens: 1
rewards: [giou, length]
reward_weights: [1.0, 0.1]
per_device_train_batch_size: {batch}
use_cpu: true
gradient_checkpointing: false
logging_steps: 1
disable_tqdm: true
optim: {optim}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("regions")
    families.save(*families.llava(), folder / "model")
    rows = region_rows(20)
    for row in rows:
        name = f"{row['id']}.png"
        row["image"].save(folder / name)
        row["image"] = name
    write_jsonl(folder / "regions.jsonl", rows)
    captions = caption_rows(10)
    for caption, row in zip(captions, rows, strict=False):
        caption["images"] = [row["image"]]
    write_jsonl(folder / "replay.jsonl", captions)
    return folder


def start(world: Path, output: Path, *, processes=1, **settings) -> subprocess.Popen:
    recipe = output.parent / f"{output.name}.yaml"
    defaults = {"anchor": "frozen", "batch": 4, "optim": "adamw_torch", "steps": 12}
    recipe.write_text(RUN.format(folder=world, output=output, **(defaults | settings)))
    command = [sys.executable, "-m", "vlm_sft_rl.train", "--config", str(recipe)]
    if processes > 1:
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, "-m", *launcher, *command[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-3000:]
    return output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("anchor", ["frozen", "start"])
def test_killed_at_random_and_resumed_is_the_run_that_was_never_killed(world, tmp_path, anchor):
    finish(start(world, tmp_path / "whole", anchor=anchor))
    rng, kills = random.Random(anchor), 0
    output = tmp_path / "killed"
    # each run is allowed at least one more checkpoint, then dies at a random moment after it
    for wanted in (2, 6, 8):
        process = start(world, output, anchor=anchor)
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if any(int(p.name.split("-")[1]) >= wanted for p in output.glob("checkpoint-*")):
                time.sleep(rng.random() * 0.5)
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.02)
        process.communicate()
    said = finish(start(world, output, anchor=anchor))
    assert kills >= 1 and "Going on from" in said
    whole, resumed = weights(tmp_path / "whole"), weights(output)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(world, tmp_path):
    finish(start(world, tmp_path / "one", batch=4, optim="sgd", steps=6))
    finish(start(world, tmp_path / "two", batch=2, optim="sgd", steps=6, processes=2))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    before = weights(world / "model")
    assert any(not torch.equal(before[name], one[name]) for name in one)
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-6, rtol=1e-4)
