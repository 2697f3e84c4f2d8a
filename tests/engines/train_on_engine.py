"""Started by `accelerate launch` or plainly: `train_on_engine.py ENGINE FOLDER RUN…` trains every RUN (`FAMILY/METHOD`), to
its end and again from halfway, and writes what came of it as `FOLDER/ENGINE/FAMILY/METHOD.json`."""

import gc
import importlib
import json
import os
import random
import sys
import time
import traceback
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent))

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from engine_cases import BATCH, HALFWAY, METHODS, REFUSED, RESUMED, STEPS

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.train import leave_process_group, parse, run
from vlm_sft_rl.trainers.grpo import VisionGRPOTrainer

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
SETTINGS = {
    "dtype": "float32",
    "max_steps": STEPS,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "adam_epsilon": 1e-5,  # a gradient of 1e-9, whose sign is that of rounding, would move a weight by a whole step
    "logging_steps": 1,
    "save_steps": HALFWAY,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "report_to": "none",
    "ddp_timeout": 600,
}


def settle(engine: str) -> dict:
    """What the engines need in order to run on a CPU; returns settings of the recipe.

    DeepSpeed would compile an operator for shared memory, which it does without where it cannot. accelerate becomes FSDP
    on accelerators alone.
    """
    if engine in ("one", "ddp"):
        return {"use_cpu": True}
    if engine == "fsdp2":
        make = PartialState.__init__

        def on_accelerators(state, *args, **kwargs):
            fresh = not state._shared_state
            make(state, *args, **kwargs)
            if fresh:
                state.distributed_type = DistributedType.MULTI_GPU

        PartialState.__init__ = on_accelerators
    else:
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    return {"use_cpu": False, "ddp_backend": "gloo", "bf16": False}


def answers_of_their_own(generate):
    """TRL's sampling with random numbers that depend on the step, the answer and the token alone: torch's own differ with
    the number of processes."""

    def seeded(trainer, *args, **kwargs):
        step, tokens = trainer.state.global_step, iter(range(1000))

        def draw(probabilities, num_samples):
            token, rows = next(tokens), len(probabilities)
            points = [random.Random(f"{step} {token} {RANK * rows + row}").random() for row in range(rows)]
            sums = probabilities.double().cumsum(1)
            return torch.searchsorted(sums, torch.tensor(points)[:, None].double() * sums[:, -1:])

        with patch("torch.multinomial", draw):
            return generate(trainer, *args, **kwargs)

    return seeded


def train(engine: str, folder: Path, family: str, name: str, output: Path, **settings):
    method = METHODS[name]
    hollow = "-hollow" if (engine, name) in REFUSED else ""
    accumulated = method.settings.get("gradient_accumulation_steps", 1)
    if engine == "one" and "vision_packing" in method.settings:
        accumulated = settings["gradient_accumulation_steps"] = (
            2  # packs of as many rows as two processes make
        )
    recipe = {
        "method": method.method,
        "model_name_or_path": str(folder / f"{family}{hollow}"),
        "train_file": str(folder / "rows" / f"{method.rows}.jsonl"),
        "image_root": str(folder / "rows"),
        "output_dir": str(output),
        "per_device_train_batch_size": BATCH // WORLD // accumulated,
        **SETTINGS,
        **method.settings,
        **settings,
    }
    if method.method == "reverse":
        recipe["hint_probability"] = 0.0
    if method.method == "sc_tune":
        recipe["rec_file"] = recipe["train_file"]
    trainer = run(recipe, *parse(recipe, [], name))
    return {
        "processes": trainer.accelerator.num_processes,
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
    }


def both_ways(engine: str, folder: Path, family: str, name: str, **settings) -> dict:
    output, began = folder / engine / family / name, time.time()
    figures = {}
    try:
        figures = train(engine, folder, family, name, output, **settings)
        if engine != "one" and (family, name) in RESUMED:
            resume = {"resume_from_checkpoint": str(output / f"checkpoint-{HALFWAY}")}
            again = output.with_name(f"{name}-resumed")
            log = train(engine, folder, family, name, again, **resume, **settings)["log"]
            figures["resumed"] = [entry["loss"] for entry in log]
    except UserError as error:
        figures["refused"] = str(error)
    except Exception:
        figures["failed"] = traceback.format_exc()
    gc.collect()
    return figures | {"seconds": round(time.time() - began, 1)}


def main(engine: str, folder: Path, runs: list[str]) -> None:
    settings = settle(engine)
    VisionGRPOTrainer._generate_single_turn = answers_of_their_own(VisionGRPOTrainer._generate_single_turn)
    for number, word in enumerate(runs):
        family, name = word.split("/")
        figures = both_ways(engine, folder, family, name, **settings)
        if RANK == 0:
            path = folder / engine / family / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(figures))
            print(f"{number + 1}/{len(runs)} {engine} {word} {figures['seconds']} s", flush=True)
        elif "failed" in figures:
            print(figures["failed"], flush=True)
    leave_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
