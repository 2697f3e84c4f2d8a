"""Killed again and again at random moments, a run ends with the weights of one that was never disturbed: every trainer but
SC-Tune's, which has its own test, and GRPO's, which differs where it is
resumed within a later epoch."""

import random
import signal
import time
from pathlib import Path

import families
import pytest
import torch
from in_processes import correction_rows, preference_rows
from safetensors.torch import load_file
from tagged_rows import prepared, write_rows
from training import finish, recipe_of, start

from vlm_sft_rl.data.rows import read_rows
from vlm_sft_rl.train import last_complete_checkpoint

KILLS = 3
SETTINGS = {
    "max_steps": 12,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 3,
    "dataloader_num_workers": 1,
    "seed": 3,
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
        "reverse LoRA",
        "packed",
        "sft",
        "sco",
        "sco LoRA",
        "reflection_dpo",
        "reflection_dpo LoRA",
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
        process.communicate()
    said = finish(start(recipe, output))
    assert kills and "Going on from" in said
    print(f"{name}: {kills} kills")
    weights = "adapter_model.safetensors" if name.endswith("LoRA") else "model.safetensors"
    whole, resumed = load_file(tmp_path / "whole" / weights), load_file(output / weights)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
