"""Run by `torchrun` on two processes, or on one: `in_processes.py JOB FOLDER NUMBER` writes what each process met."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import families
from accelerate.utils import gather_object
from image_rows import tagged_rows
from peft import LoraConfig
from PIL import Image
from regions import by_length
from regions import trainer as region_trainer
from training import tagged, trainer_of

from vlm_sft_rl.data.corrections import Draft, correction_row
from vlm_sft_rl.data.stages import Staged, format_staged
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.train import leave_process_group
from vlm_sft_rl.trainers.reflection_dpo import ReflectionDPOTrainer
from vlm_sft_rl.trainers.self_correction_sft import SelfCorrectionSFTTrainer
from vlm_sft_rl.trainers.verification_sft import VerificationSFTTrainer

RANK = os.environ.get("RANK", "0")
# with Adam a gradient of 1e-9 moves a weight by a whole step, and processes add in another order
SGD = {"optim": "sgd", "learning_rate": 0.1, "gradient_checkpointing": False}


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (56, 56), (20 * number, 90, 200))


def packed(folder: Path, accumulation: int) -> dict:
    """Which rows each packed batch of an epoch holds, and the losses."""
    settings = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 4}
    settings |= {"gradient_accumulation_steps": accumulation, "hint_probability": 0.0, **SGD}
    rows = tagged_rows(pictures=4, each=4)
    trainer = trainer_of(VerificationSFTTrainer, folder, rows, tagged(), vision_packing="image", **settings)
    collate, packs = trainer.data_collator, []

    def watched(items):
        packs.append(sorted(row["id"] for item in items for row in item["rows"]))
        return collate(items)

    trainer.data_collator = watched
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"packs": packs, "losses": losses, "weights": total(trainer.model)}


def correction_rows() -> list[dict]:
    rows = []
    for i in range(12):
        first, last = (format_staged(Staged("count", f"{n} cats", f"so {n}", str(n))) for n in (i + i % 2, i))
        drafts = [Draft(first, i % 2 == 0), Draft(last, True)]
        rows.append(correction_row(f"r{i}", [], "How many cats?", drafts, "check") | {"images": [picture(i)]})
    return rows


def preference_rows() -> list[dict]:
    return [
        {
            "id": f"p{i}",
            "images": [picture(i)],
            "prompt": [{"role": "user", "content": "How many things?"}],
            "chosen": [{"role": "assistant", "content": "It is one" + " more" * (i % 3)}],
            "rejected": [{"role": "assistant", "content": "It is two, or three"}],
            "pair_kind": ("cot", "refine")[i % 2],
            "pair_weight": 0.5 + i % 3,
        }
        for i in range(12)
    ]


def methods(folder: Path, batch: int) -> dict:
    """Losses of self-correction SFT, and of reflection DPO with adapters, whose reference is read from `../model`."""
    settings = {"per_device_train_batch_size": batch, **SGD}
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    sco = trainer_of(SelfCorrectionSFTTrainer, folder, correction_rows(), families.llava(), **settings)
    start, more = folder.parent / "model", {"peft_config": lora, "disable_dropout": True}
    dpo = trainer_of(ReflectionDPOTrainer, folder, preference_rows(), start, **settings, **more)
    logs = {}
    for name, trainer in (("sco", sco), ("dpo", dpo)):
        trainer.train()
        logs[name] = [entry for entry in trainer.state.log_history if "loss" in entry]
    return logs


def signal(folder: Path, steps: int) -> dict:
    """SC-Tune's describer steps with a signal on one process alone, then on none."""

    def reward(completions, trainer_state, **columns):
        earns = RANK == "1" and trainer_state.global_step == 0
        return by_length(completions) if earns else [0.7] * len(completions)

    settings = {"kl_coef": 0.0, "max_steps": steps, "describer_steps": steps}
    trainer = region_trainer(folder / "out", reward_funcs=reward, **settings)
    sums, skip_update = [], trainer.skip_update
    trainer.skip_update = lambda: sums.append(total(trainer.model)) or skip_update()
    start = total(trainer.model)
    trainer.train()
    skipped = [e["describer/skipped"] for e in trainer.state.log_history if "describer/skipped" in e]
    return {"start": start, "sums": sums, "end": total(trainer.model), "skipped": skipped}


def poisoned(folder: Path, step: int) -> dict:
    """A row whose loss is no number, on one process; what each process says of it."""
    rows = tagged_rows(pictures=8, each=2)
    settings = {"max_steps": 4, "per_device_train_batch_size": 1, **SGD}
    trainer = trainer_of(VerificationSFTTrainer, folder, rows, tagged(), **settings)
    collate, met = trainer.data_collator, []

    def collator(features):
        batch, step_of_row = collate(features), len(met)
        met.append(features[0]["id"])
        if RANK == "1" and step_of_row == step:
            batch["loss_weights"][:] = float("nan")
        return batch

    trainer.data_collator = collator
    try:
        trainer.train()
    except UserError as error:
        stopped = str(error)
    step = trainer.state.global_step
    rows = gather_object([met[step]])
    return {"stopped": stopped, "row": rows[1], "moved": total(trainer.model)}


def total(model) -> float:
    return sum(float(p.detach().double().abs().sum()) for p in model.parameters())


if __name__ == "__main__":
    job, folder, number = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    figures = {"packed": packed, "methods": methods, "signal": signal, "poisoned": poisoned}[job](
        folder, number
    )
    leave_process_group()
    names = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    figures["threads of gloo"] = [name for name in names if "gloo" in name]
    (folder / f"rank{RANK}.json").write_text(json.dumps(figures))
