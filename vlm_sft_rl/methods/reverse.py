"""REVERSE: a recipe and its files to a `VerificationSFTTrainer`."""

import dataclasses
import os
from pathlib import Path

import torch

from ..data.images import image_root_of
from ..data.tagged_set import load_train_rows
from ..decoding import generate_plain
from ..dry_run import Plan
from ..errors import UserError
from ..evaluation.probe import VerifierProbe
from ..models.load import load_for_training, processor_for_training
from ..models.meta import meta_model
from ..models.peft import build_peft_config
from ..models.tokens import require_verification_tokens
from ..trainers.verification_config import VerificationSFTConfig
from ..trainers.verification_sft import VerificationSFTTrainer, build_collator
from .effective import effective_recipe

CONFIG = VerificationSFTConfig


def build(recipe: dict, model_args, data_args, args):
    """Model, data and trainer of a recipe, ready for `train()`."""
    require_rows(data_args)
    if os.path.isdir(model_args.model_name_or_path or ""):
        # an adapter remembers its base by this path and may be loaded from another folder
        model_args.model_name_or_path = os.path.abspath(model_args.model_name_or_path)
    torch.manual_seed(args.seed)
    model, processor, token_ids, sidecar = load_for_training(model_args)
    with args.main_process_first(desc="indexing the training rows"):
        rows, eval_rows = load_rows(data_args)
    trainer = VerificationSFTTrainer(
        model,
        args,
        data_collator=collator(processor, data_args, args),
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        peft_config=build_peft_config(model, model_args, token_ids),
    )
    trainer.sidecar = dataclasses.replace(
        sidecar, recipe=effective_recipe(recipe, model_args, data_args, args)
    )
    if data_args.probe_spec:
        trainer.add_callback(build_probe(data_args, trainer, processor))
    return trainer


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


def plan(recipe: dict, model_args, data_args, args) -> Plan:
    """What `build` would make, with the model on the meta device."""
    require_rows(data_args)
    processor = processor_for_training(model_args)
    token_ids = require_verification_tokens(processor, model_args.model_name_or_path)
    model = meta_model(model_args, token_ids)
    rows, _ = load_rows(data_args)
    return Plan(model, processor, rows, collator(processor, data_args, args))


def require_rows(data_args) -> None:
    if not data_args.train_file:
        raise UserError("`train_file` is not set. Name the training rows in the recipe or with --train_file.")


def load_rows(data_args):
    """Training rows, and evaluation rows or None."""
    where = {"image_root": training_image_root(data_args), "cache_dir": data_args.index_dir}
    rows = load_train_rows(
        data_args.train_file, subsample=data_args.subsample, seed=data_args.subsample_seed, **where
    )
    return rows, load_train_rows(data_args.eval_file, **where) if data_args.eval_file else None


def collator(processor, data_args, args):
    rejects = data_args.rejects_file or os.path.join(args.output_dir, "rejects.jsonl")
    return build_collator(
        processor,
        args,
        image_root=training_image_root(data_args),
        on_bad_row=data_args.on_bad_row,
        rejects_path=rejects if data_args.on_bad_row == "skip" else None,
    )


def build_probe(data_args, trainer, processor):
    """The callback that asks the model questions during training (`probe_*` keys)."""

    def generate(model, images, prompts, max_new_tokens):
        # the projector may be float32 beside 16-bit weights
        with trainer.accelerator.autocast():
            return generate_plain(
                model, processor, images, prompts, max_new_tokens=max_new_tokens, batch_size=16
            )

    return VerifierProbe(
        trainer.record,
        generate,
        data_args.probe_spec,
        data_args.probe_data_dir or ".",
        questions=data_args.probe_questions,
        every=data_args.probe_every,
        limit=data_args.probe_limit,
    )
