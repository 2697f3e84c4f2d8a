"""Run by `torchrun` on two processes, or on one: losses of self-correction SFT and of reflection DPO with adapters.

The model of DPO lies beside the folder that is given: its reference is read from the disk.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import families
from datasets import Dataset
from peft import LoraConfig
from PIL import Image

from vlm_sft_rl.data.corrections import Draft, correction_row
from vlm_sft_rl.data.stages import Staged, format_staged
from vlm_sft_rl.train import leave_process_group
from vlm_sft_rl.trainers.reflection_dpo import ReflectionDPOConfig, ReflectionDPOTrainer
from vlm_sft_rl.trainers.self_correction_sft import SelfCorrectionSFTConfig, SelfCorrectionSFTTrainer

SETTINGS = {
    "max_steps": 3,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
    "disable_dropout": True,
}


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (56, 56), (20 * number, 90, 200))


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


def self_correction(folder: Path, batch: int) -> SelfCorrectionSFTTrainer:
    model, processor = families.llava()
    settings = {name: value for name, value in SETTINGS.items() if name != "disable_dropout"}
    args = SelfCorrectionSFTConfig(str(folder / "sco"), per_device_train_batch_size=batch, **settings)
    return SelfCorrectionSFTTrainer(
        model, args, train_dataset=Dataset.from_list(correction_rows()), processing_class=processor
    )


def reflection(folder: Path, batch: int) -> ReflectionDPOTrainer:
    args = ReflectionDPOConfig(str(folder / "dpo"), per_device_train_batch_size=batch, **SETTINGS)
    return ReflectionDPOTrainer(
        str(folder.parent / "model"),
        None,
        args,
        train_dataset=Dataset.from_list(preference_rows()),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )


def main(folder: Path, batch: int) -> None:
    logged = {}
    for name, make in (("sco", self_correction), ("dpo", reflection)):
        trainer = make(folder, batch)
        trainer.train()
        logged[name] = [entry for entry in trainer.state.log_history if "loss" in entry]
    (folder / f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(logged))
    leave_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
