"""What every SFT method does with a recipe: model, rows, collator, trainer."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import torch

from ..data.images import image_root_of
from ..data.index import load_train_rows
from ..dry_run import Plan
from ..errors import UserError
from ..models.load import load_for_training, processor_for_training
from ..models.lora import build_peft_config
from ..models.memory import meta_model
from ..models.tokens import require_verification_tokens
from ..trainers.base import RowSFTTrainer
from ..trainers.checks import check_arguments
from .effective import effective_recipe


def build(
    trainer_class: type[RowSFTTrainer],
    make_collator: Callable,
    recipe: dict,
    model_args,
    data_args,
    args,
    *,
    verification: bool = False,
) -> RowSFTTrainer:
    """Model, data and trainer of a recipe, ready for `train()`.

    Args:
        make_collator: `(processor, args, **settings of VisionCollator) -> collator`.
        verification: the model must have verification tokens, and LoRA trains their rows.
    """
    require_rows(data_args)
    if os.path.isdir(model_args.model_name_or_path or ""):
        # an adapter remembers its base by this path and may be loaded from another folder
        model_args.model_name_or_path = os.path.abspath(model_args.model_name_or_path)
    torch.manual_seed(args.seed)
    model, processor, token_ids, sidecar = load_for_training(model_args, verification=verification)
    with args.main_process_first(desc="indexing the training rows"):
        rows, eval_rows = load_rows(data_args)
    trainer = trainer_class(
        model,
        args,
        data_collator=collator(make_collator, processor, data_args, args),
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        peft_config=build_peft_config(model, model_args, token_ids),
    )
    trainer.sidecar = dataclasses.replace(
        sidecar, recipe=effective_recipe(recipe, model_args, data_args, args)
    )
    return trainer


def plan(make_collator: Callable, model_args, data_args, args, *, verification: bool = False) -> Plan:
    """What `build` would make, with the model on the meta device."""
    check_arguments(args)
    require_rows(data_args)
    processor = processor_for_training(model_args, verification=verification)
    path = model_args.model_name_or_path
    token_ids = require_verification_tokens(processor, path) if verification else ()
    model = meta_model(model_args, token_ids)
    rows, _ = load_rows(data_args)
    return Plan(model, processor, rows, collator(make_collator, processor, data_args, args))


def require_rows(data_args) -> None:
    if not data_args.train_file:
        raise UserError("`train_file` is not set. Name the training rows in the recipe or with --train_file.")


def training_image_root(data_args) -> Path:
    """The folder that the image paths of both files start from.

    Raises:
        UserError: it is no folder; or it is not set and the two files lie in different folders.
    """
    root = image_root_of(data_args.train_file, data_args.image_root)
    if data_args.image_root is None and data_args.eval_file and image_root_of(data_args.eval_file) != root:
        raise UserError(
            f"{data_args.train_file} and {data_args.eval_file} lie in different folders, and image paths start from one. "
            "Set `image_root`."
        )
    return root


def load_rows(data_args):
    """Training rows, and evaluation rows or None."""
    where = {"image_root": training_image_root(data_args), "cache_dir": data_args.index_dir}
    rows = load_train_rows(
        data_args.train_file, subsample=data_args.subsample, seed=data_args.subsample_seed, **where
    )
    return rows, load_train_rows(data_args.eval_file, **where) if data_args.eval_file else None


def collator(make_collator: Callable, processor, data_args, args):
    rejects = data_args.rejects_file or os.path.join(args.output_dir, "rejects.jsonl")
    return make_collator(
        processor,
        args,
        image_root=training_image_root(data_args),
        on_bad_row=data_args.on_bad_row,
        rejects_path=rejects if data_args.on_bad_row == "skip" else None,
    )
