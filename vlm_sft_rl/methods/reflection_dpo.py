"""DPO on reflection pairs: a recipe and its files to a `ReflectionDPOTrainer`."""

import dataclasses
import os

import torch
from datasets import Dataset

from ..data.collators import PreferenceCollator
from ..data.rows import read_pairs
from ..errors import UserError
from ..models.load import load_for_training
from ..models.lora import build_peft_config
from ..trainers.reflection_dpo import ReflectionDPOConfig, ReflectionDPOTrainer
from .effective import effective_recipe
from .row_sft import training_image_root

CONFIG = ReflectionDPOConfig


def build(recipe: dict, model_args, data_args, args):
    """Model, data and trainer of a recipe, ready for `train()`; `train_file` holds preference rows."""
    if not data_args.train_file:
        raise UserError(
            "`train_file` is not set. Name the preference rows in the recipe or with --train_file."
        )
    if data_args.on_bad_row != "error":
        raise UserError("`on_bad_row: skip` is not possible for pairs: half a pair cannot be left out.")
    if os.path.isdir(model_args.model_name_or_path or ""):
        # an adapter remembers its base by this path, and the reference is read from it
        model_args.model_name_or_path = os.path.abspath(model_args.model_name_or_path)
    torch.manual_seed(args.seed)
    model, processor, _, sidecar = load_for_training(model_args, verification=False)
    eval_file = data_args.eval_file
    trainer = ReflectionDPOTrainer(
        model,
        None,
        args,
        data_collator=PreferenceCollator(
            processor, image_root=training_image_root(data_args), max_length=args.max_length
        ),
        train_dataset=Dataset.from_list(read_pairs(data_args.train_file)),
        eval_dataset=Dataset.from_list(read_pairs(eval_file)) if eval_file else None,
        processing_class=processor,
        peft_config=build_peft_config(model, model_args, ()),
    )
    trainer.sidecar = dataclasses.replace(
        sidecar, recipe=effective_recipe(recipe, model_args, data_args, args)
    )
    return trainer
