"""Supervised warm-up of the pocket base on region rows: the grounding model that SC-Tune starts from, and its control."""

from itertools import cycle, islice
from pathlib import Path

import torch
from trl import SFTConfig, SFTTrainer

from ..data.chat import load_processor
from ..data.collators import VisionCollator
from ..data.rows import read_rows
from ..models.checkpoints import save_checkpoint
from ..models.load import load_model
from ..models.parts import set_trainable
from ..models.sidecar import Sidecar
from ..models.versions import CHECKPOINTING
from ..train import last_complete_checkpoint


def warm_up(
    source: str | Path,
    target: str | Path,
    rows: str | Path,
    image_root: str | Path,
    *,
    steps: int,
    seed: int = 0,
    learning_rate: float = 3e-4,
    decay_steps: int = 0,
    batch_size: int = 32,
    replay: tuple[Path, float] | None = None,
) -> Path:
    """Plain SFT of the language model on `rows`, in place of a grounding model's instruction tuning.

    Killed at any moment, the same call goes on from the last complete checkpoint.

    Args:
        decay_steps: over so many of the last steps the learning rate falls to 0.
        replay: a file of more rows, and how many of them join each of the `batch_size` rows of a batch (on average).
    """
    mixed = list(read_rows(rows))
    if replay is not None:
        file, share = replay
        replayed = list(read_rows(file))
        mixed = [*islice(cycle(mixed), round(len(replayed) / share)), *replayed]
        batch_size = round(batch_size * (1 + share))
    torch.manual_seed(seed)
    processor = load_processor(source)
    model = load_model(source, dtype="float32")
    set_trainable(model, vision=False, projector=False, language=True)
    collate = VisionCollator(processor, image_root=image_root)
    args = SFTConfig(
        str(target),
        per_device_train_batch_size=batch_size,
        max_steps=steps,
        learning_rate=learning_rate,
        warmup_steps=10,
        **_schedule(decay_steps),
        adam_beta2=0.95,
        weight_decay=0.0,
        seed=seed,
        max_length=None,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        **{CHECKPOINTING: False},
        use_cpu=True,
        bf16=False,
        save_steps=50,
        save_total_limit=1,
        logging_steps=10,
        report_to=[],
    )
    trainer = SFTTrainer(
        model,
        args,
        data_collator=lambda batch: {k: v for k, v in collate(batch).items() if k != "loss_weights"},
        train_dataset=_dataset(mixed),
        processing_class=processor,
    )
    checkpoint, _ = last_complete_checkpoint(target)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    model.config.use_cache = True
    return save_checkpoint(model, processor, target, Sidecar(box_convention="pocket"))


def _schedule(decay_steps: int) -> dict:
    if not decay_steps:
        return {"lr_scheduler_type": "constant_with_warmup"}
    return {
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": decay_steps},
    }


def _dataset(rows: list[dict]):
    from datasets import Dataset

    return Dataset.from_list([{k: row[k] for k in ("id", "images", "messages")} for row in rows])
