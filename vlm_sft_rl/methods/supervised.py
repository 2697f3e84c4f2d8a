"""The supervised methods (`reverse`, `sft`, `sco`, and the SFT of `r3v` and `rewind`): one way from rows to a trainer, four
trainers and collators."""

import os
from collections.abc import Callable
from dataclasses import dataclass

from ..data.index import load_train_rows
from ..dry_run import Plan
from ..errors import UserError
from ..models.load import processor_for_training
from ..models.memory import meta_model
from ..models.tokens import require_verification_tokens
from ..self_training.config import RewindLoopConfig, SelfTrainingConfig
from ..settings import data_seed
from ..trainers.base import WeightedSFTConfig, WeightedSFTTrainer
from ..trainers.checks import check_arguments, check_doubts, check_tagged
from ..trainers.mixture_sft import MixtureSFTConfig, MixtureSFTTrainer, build_kind_collator
from ..trainers.self_correction_sft import (
    SelfCorrectionSFTConfig,
    SelfCorrectionSFTTrainer,
    build_correction_collator,
)
from ..trainers.verification_sft import VerificationSFTConfig, VerificationSFTTrainer, build_collator
from . import build_probe, check_files, load_start, remember_recipe, train_source, training_image_root


@dataclass
class R3VConfig(SelfTrainingConfig, MixtureSFTConfig):
    """The settings of the self-training loop and those of the SFT in each of its rounds."""


@dataclass
class RewindConfig(RewindLoopConfig, MixtureSFTConfig):
    """The settings of the loop on rewinds and those of the SFT in each of its rounds."""


@dataclass(frozen=True)
class SupervisedMethod:
    """What a recipe's `method` stands for.

    Attributes:
        make_collator: `(processor, args, **settings of VisionCollator) -> collator`.
        verification: the model must have verification tokens, and LoRA trains their rows.
        rows: what `train_file` names, in a message's words.
    """

    CONFIG: type[WeightedSFTConfig]
    trainer: type[WeightedSFTTrainer]
    make_collator: Callable
    verification: bool = False
    rows: str = "the training rows"

    def build(self, recipe: dict, model_args, data_args, args) -> WeightedSFTTrainer:
        """Model, data and trainer of a recipe, ready for `train()`."""
        self._check_data(data_args, args)
        with args.main_process_first(desc="indexing the training rows"):
            rows, eval_rows = load_rows(data_args, args)
        if "messages" in (getattr(rows, "column_names", None) or ()):  # of a stream it is seen when they come
            check_doubts(args, rows)
        if self.verification:
            check_tagged(rows, warn=False)
        start = load_start(model_args, args, verification=self.verification)
        trainer = self.trainer(
            start.model,
            args,
            data_collator=self._collator(start.processor, data_args, args),
            train_dataset=rows,
            eval_dataset=eval_rows,
            processing_class=start.processor,
            peft_config=start.peft_config,
        )
        remember_recipe(trainer, recipe, model_args, data_args, args)
        if self.verification and data_args.probe_spec:
            trainer.add_callback(build_probe(data_args, trainer))
        return trainer

    def plan(self, recipe: dict, model_args, data_args, args) -> Plan:
        """What `build` would make, with the model on the meta device."""
        check_arguments(args)
        self._check_data(data_args, args)
        processor = processor_for_training(model_args, verification=self.verification)
        path = model_args.model_name_or_path
        token_ids = require_verification_tokens(processor, path) if self.verification else ()
        model = meta_model(model_args, token_ids)
        rows, _ = load_rows(data_args, args)
        if self.verification:
            check_tagged(rows)
        return Plan(model, processor, rows, self._collator(processor, data_args, args))

    def _check_data(self, data_args, args) -> None:
        check_files(data_args, self.rows)
        if data_args.streaming:
            check_streaming(data_args, args)

    def _collator(self, processor, data_args, args):
        rejects = data_args.rejects_file or os.path.join(args.output_dir, "rejects.jsonl")
        return self.make_collator(
            processor,
            args,
            image_root=training_image_root(data_args),
            rejects_path=rejects if data_args.on_bad_row == "skip" else None,
        )


LOOP_ROWS = "the rows of one round (`vlm-sft-rl self-train` makes them and runs all rounds)"
METHODS = {
    "reverse": SupervisedMethod(
        VerificationSFTConfig, VerificationSFTTrainer, build_collator, verification=True
    ),
    "sft": SupervisedMethod(MixtureSFTConfig, MixtureSFTTrainer, build_kind_collator),
    # one recipe for the loop (`vlm-sft-rl self-train`) and, by `train`, for one round of it by hand
    "r3v": SupervisedMethod(R3VConfig, MixtureSFTTrainer, build_kind_collator, rows=LOOP_ROWS),
    "rewind": SupervisedMethod(RewindConfig, MixtureSFTTrainer, build_kind_collator, rows=LOOP_ROWS),
    "sco": SupervisedMethod(SelfCorrectionSFTConfig, SelfCorrectionSFTTrainer, build_correction_collator),
}


def load_rows(data_args, args):
    """Training rows, and evaluation rows or None.

    Raises UserError: as `load_train_rows` or `NamedDataset`.
    """
    where = {"image_root": training_image_root(data_args), "cache_dir": data_args.index_dir}
    source, draw = (
        train_source(data_args),
        {"subsample": data_args.subsample, "seed": data_args.subsample_seed},
    )
    if not data_args.dataset_name:
        rows = load_train_rows(source, **draw, **where)
    elif not data_args.streaming:
        rows = source.train_rows(**draw, cache_dir=data_args.index_dir)
    else:
        rows = source.stream(data_seed(args))
        # each process reads for itself: a batch of pictures cannot be cut for the others
        args.accelerator_config.dispatch_batches = False
        args.dataloader_num_workers = min(args.dataloader_num_workers, rows.num_shards)
    return rows, load_train_rows(data_args.eval_file, **where) if data_args.eval_file else None


def check_streaming(data_args, args) -> None:
    """Raises UserError: a setting that needs the number of rows, their lengths or their places."""
    strategy = str(getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy))
    refused = {
        "max_steps": (
            args.max_steps <= 0,
            "how many rows a stream has is not known. Say how many steps to take",
        ),
        "subsample": (
            data_args.subsample is not None,
            "rows are drawn from all of them. Set `max_steps` alone",
        ),
        "train_sampling_strategy": (
            strategy != "random",
            f"{strategy} needs the rows' lengths before the first step. Leave it out",
        ),
        "vision_packing": (
            args.vision_packing == "image" or args.vision_packing_tokens is not None,
            "packs are planned over all rows. Set it to `rows`, without `vision_packing_tokens`",
        ),
    }
    for name, (wrong, reason) in refused.items():
        if wrong:
            raise UserError(f"`streaming` and `{name}`: {reason}, or set `streaming: false`.")
