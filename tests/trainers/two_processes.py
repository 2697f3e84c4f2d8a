"""Run by `torchrun` on two processes, or on one: which rows each packed batch of an epoch holds, and the losses."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import families
from datasets import Dataset
from image_rows import tagged_rows

from vlm_sft_rl.models.tokens import add_verification_tokens
from vlm_sft_rl.train import leave_process_group
from vlm_sft_rl.trainers.verification_sft import VerificationSFTConfig, VerificationSFTTrainer


def main(folder: str, accumulation: int) -> None:
    model, processor = families.llava()
    add_verification_tokens(model, processor)
    args = VerificationSFTConfig(
        folder,
        num_train_epochs=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
        learning_rate=1e-3,
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        hint_probability=0.0,
        vision_packing="image",
    )
    rows = tagged_rows(pictures=4, each=4)
    trainer = VerificationSFTTrainer(
        model, args, train_dataset=Dataset.from_list(rows), processing_class=processor
    )
    seen: list[list[str]] = []
    collate = trainer.data_collator

    def watched(items):
        seen.append(sorted(row["id"] for item in items for row in item["rows"]))
        return collate(items)

    trainer.data_collator = watched
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    total = sum(float(p.detach().double().abs().sum()) for p in trainer.model.parameters())
    rank = os.environ.get("RANK", "0")
    Path(folder, f"rank{rank}.json").write_text(
        json.dumps({"seen": seen, "losses": losses, "weights": total})
    )
    leave_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
