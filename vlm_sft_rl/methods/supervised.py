"""The supervised methods (`reverse`, `sft`, `r3v`, `sco`): one way from rows to a trainer, four trainers and collators."""

import os
from collections.abc import Callable
from dataclasses import dataclass

from ..data.index import load_train_rows
from ..dry_run import Plan
from ..models.load import processor_for_training
from ..models.memory import meta_model
from ..models.tokens import require_verification_tokens
from ..self_training.config import SelfTrainingConfig
from ..trainers.base import WeightedSFTConfig, WeightedSFTTrainer
from ..trainers.checks import check_arguments, check_tagged
from ..trainers.mixture_sft import MixtureSFTConfig, MixtureSFTTrainer, build_kind_collator
from ..trainers.self_correction_sft import (
    SelfCorrectionSFTConfig,
    SelfCorrectionSFTTrainer,
    build_correction_collator,
)
from ..trainers.verification_sft import VerificationSFTConfig, VerificationSFTTrainer, build_collator
from . import check_files, load_start, remember_recipe, training_image_root


@dataclass
class R3VConfig(SelfTrainingConfig, MixtureSFTConfig):
    """The settings of the self-training loop and those of the SFT in each of its rounds."""


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
        check_files(data_args, self.rows)
        with args.main_process_first(desc="indexing the training rows"):
            rows, eval_rows = load_rows(data_args)
        if self.verification:
            check_tagged(rows)
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
        check_files(data_args, self.rows)
        processor = processor_for_training(model_args, verification=self.verification)
        path = model_args.model_name_or_path
        token_ids = require_verification_tokens(processor, path) if self.verification else ()
        model = meta_model(model_args, token_ids)
        rows, _ = load_rows(data_args)
        if self.verification:
            check_tagged(rows)
        return Plan(model, processor, rows, self._collator(processor, data_args, args))

    def _collator(self, processor, data_args, args):
        rejects = data_args.rejects_file or os.path.join(args.output_dir, "rejects.jsonl")
        return self.make_collator(
            processor,
            args,
            image_root=training_image_root(data_args),
            rejects_path=rejects if data_args.on_bad_row == "skip" else None,
        )


METHODS = {
    "reverse": SupervisedMethod(
        VerificationSFTConfig, VerificationSFTTrainer, build_collator, verification=True
    ),
    "sft": SupervisedMethod(MixtureSFTConfig, MixtureSFTTrainer, build_kind_collator),
    # one recipe for the loop (`vlm-sft-rl self-train`) and, by `train`, for one round of it by hand
    "r3v": SupervisedMethod(
        R3VConfig,
        MixtureSFTTrainer,
        build_kind_collator,
        rows="the rows of one round (`vlm-sft-rl self-train` makes them and runs all rounds)",
    ),
    "sco": SupervisedMethod(SelfCorrectionSFTConfig, SelfCorrectionSFTTrainer, build_correction_collator),
}


def load_rows(data_args):
    """Training rows, and evaluation rows or None."""
    where = {"image_root": training_image_root(data_args), "cache_dir": data_args.index_dir}
    rows = load_train_rows(
        data_args.train_file, subsample=data_args.subsample, seed=data_args.subsample_seed, **where
    )
    return rows, load_train_rows(data_args.eval_file, **where) if data_args.eval_file else None


def build_probe(data_args, trainer: WeightedSFTTrainer):
    """The callback that asks the model questions during training (`probe_*` keys)."""
    from ..decoding import SamplingConfig, generate_plain
    from ..evaluation.probe import VerifierProbe

    def generate(model, images, prompts, max_new_tokens):
        # the projector may be float32 beside 16-bit weights
        with trainer.accelerator.autocast():
            config = SamplingConfig(max_new_tokens=max_new_tokens)
            return generate_plain(model, trainer.processing_class, images, prompts, config, batch_size=16)

    return VerifierProbe(
        trainer.record,
        generate,
        data_args.probe_spec,
        data_args.probe_data_dir or ".",
        questions=data_args.probe_questions,
        every=data_args.probe_every,
        limit=data_args.probe_limit,
    )
