"""DPO on preference pairs: a recipe and its files to a `ReflectionDPOTrainer`."""

from datasets import Dataset

from ..data.collators import PreferenceCollator
from ..data.rows import read_pairs
from ..dry_run import Plan
from ..models.load import processor_for_training
from ..models.memory import meta_model
from ..models.tokens import require_verification_tokens
from ..settings import data_seed
from ..trainers.reflection_dpo import ReflectionDPOConfig, ReflectionDPOTrainer, check_dpo
from . import (
    build_probe,
    check_files,
    load_start,
    remember_recipe,
    subsampled,
    train_source,
    training_image_root,
)

CONFIG = ReflectionDPOConfig


def build(recipe: dict, model_args, data_args, args) -> ReflectionDPOTrainer:
    """Model, data and trainer of a recipe, ready for `train()`; `train_file` holds preference rows."""
    check_data(data_args)
    pairs = training_pairs(data_args)
    check_dpo(args, pairs)
    start = load_start(model_args, args)
    eval_file = data_args.eval_file
    trainer = ReflectionDPOTrainer(
        start.model,
        None,
        args,
        data_collator=make_collator(start.processor, data_args, args),
        train_dataset=pairs,
        eval_dataset=Dataset.from_list(read_pairs(eval_file)) if eval_file else None,
        processing_class=start.processor,
        peft_config=start.peft_config,
    )
    remember_recipe(trainer, recipe, model_args, data_args, args)
    if data_args.probe_spec:
        trainer.add_callback(build_probe(data_args, trainer))
    return trainer


def plan(recipe: dict, model_args, data_args, args) -> Plan:
    """What `build` would make, with the model on the meta device."""
    check_data(data_args)
    processor = processor_for_training(model_args, verification=False)
    pairs = training_pairs(data_args)
    check_dpo(args, pairs)
    if args.phrases_only or args.verdict_weight:
        require_verification_tokens(processor, model_args.model_name_or_path)
    whole = "`verdict_weight` reads the whole output embedding."
    # without adapters a second model is the reference
    return Plan(
        meta_model(model_args, ()),
        processor,
        pairs,
        make_collator(processor, data_args, args),
        extra={} if model_args.use_peft else {"copies": 1},
        refused={"zero3": whole, "fsdp2": whole} if args.verdict_weight else {},
        rows_per_pass=4 if args.image_weight else 2,
    )


def check_data(data_args) -> None:
    check_files(
        data_args, "the preference rows", "half a pair cannot be left out. Correct or remove the row."
    )


def training_pairs(data_args) -> Dataset:
    return Dataset.from_list(subsampled(read_pairs(train_source(data_args)), data_args))


def make_collator(processor, data_args, args) -> PreferenceCollator:
    return PreferenceCollator(
        processor,
        args.phrases_only,
        args.image_weight,
        args.image_crop,
        data_seed(args),
        image_root=training_image_root(data_args),
        max_length=args.max_length,
    )
