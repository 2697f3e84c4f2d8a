"""SC-Tune: a recipe and its files to an `SCTuneTrainer`."""

import dataclasses
import os

import torch
from datasets import Dataset

from ..data.regions import RegionCollator, read_regions
from ..errors import UserError
from ..models.load import load_for_training
from ..models.peft import build_peft_config
from ..trainers.sc_tune import SCTuneTrainer
from ..trainers.sc_tune_config import SCTuneConfig
from .effective import effective_recipe

CONFIG = SCTuneConfig


def build(recipe: dict, model_args, data_args, args):
    """Model, data and trainer of a recipe, ready for `train()`."""
    if not data_args.train_file:
        raise UserError("`train_file` is not set. Name the region rows in the recipe or with --train_file.")
    if data_args.on_bad_row != "error":
        raise UserError(
            "`on_bad_row: skip`: region rows are checked when the file is read; correct or remove them."
        )
    if os.path.isdir(model_args.model_name_or_path or ""):
        # an adapter remembers its base by this path and may be loaded from another folder
        model_args.model_name_or_path = os.path.abspath(model_args.model_name_or_path)
    torch.manual_seed(args.seed)
    model, processor, token_ids, sidecar = load_for_training(
        model_args, verification=args.describer == "retrospective"
    )
    trainer = SCTuneTrainer(
        model,
        args,
        data_collator=RegionCollator(data_args.image_root),
        train_dataset=load_regions(data_args.train_file, data_args.subsample, data_args.subsample_seed),
        eval_dataset=load_regions(data_args.eval_file) if data_args.eval_file else None,
        rec_dataset=load_regions(args.rec_file) if args.rec_file else None,
        processing_class=processor,
        peft_config=build_peft_config(model, model_args, token_ids),
    )
    trainer.sidecar = dataclasses.replace(
        sidecar,
        box_convention=trainer.prompts.convention.name,
        recipe=effective_recipe(recipe, model_args, data_args, args),
    )
    return trainer


def load_regions(path: str, subsample: int | None = None, seed: int = 0) -> Dataset:
    """The region rows of a file, as a dataset; `subsample` draws so many without replacement."""
    rows = read_regions(path)
    if subsample is not None and subsample < len(rows):
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:subsample]
        rows = [rows[i] for i in sorted(chosen.tolist())]
    fields = dict.fromkeys(key for row in rows for key in row)
    return Dataset.from_list([{key: row.get(key) for key in fields} for row in rows])
