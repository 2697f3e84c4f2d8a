"""LLaVA-SCo: a recipe and its files to a `SelfCorrectionSFTTrainer`."""

import dataclasses
import os

import torch

from ..data.tagged_set import load_train_rows
from ..errors import UserError
from ..models.load import load_for_training
from ..models.peft import build_peft_config
from ..trainers.self_correction_sft import (
    SelfCorrectionSFTConfig,
    SelfCorrectionSFTTrainer,
    build_correction_collator,
)
from .effective import effective_recipe

CONFIG = SelfCorrectionSFTConfig


def build(recipe: dict, model_args, data_args, args):
    """Model, data and trainer of a recipe, ready for `train()`. The model needs no verification tokens."""
    if not data_args.train_file:
        raise UserError("`train_file` is not set. Name the training rows in the recipe or with --train_file.")
    if os.path.isdir(model_args.model_name_or_path or ""):
        # an adapter remembers its base by this path and may be loaded from another folder
        model_args.model_name_or_path = os.path.abspath(model_args.model_name_or_path)
    torch.manual_seed(args.seed)
    model, processor, _, sidecar = load_for_training(model_args, verification=False)
    where = {"image_root": data_args.image_root, "cache_dir": data_args.index_dir}
    with args.main_process_first(desc="indexing the training rows"):
        rows = load_train_rows(
            data_args.train_file, subsample=data_args.subsample, seed=data_args.subsample_seed, **where
        )
        eval_rows = load_train_rows(data_args.eval_file, **where) if data_args.eval_file else None
    rejects = data_args.rejects_file or os.path.join(args.output_dir, "rejects.jsonl")
    trainer = SelfCorrectionSFTTrainer(
        model,
        args,
        data_collator=build_correction_collator(
            processor,
            args,
            image_root=data_args.image_root,
            on_bad_row=data_args.on_bad_row,
            rejects_path=rejects if data_args.on_bad_row == "skip" else None,
        ),
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        peft_config=build_peft_config(model, model_args, ()),
    )
    trainer.sidecar = dataclasses.replace(
        sidecar, recipe=effective_recipe(recipe, model_args, data_args, args)
    )
    return trainer
