"""DPO on reflection pairs: a recipe and its files to a `ReflectionDPOTrainer`."""

from datasets import Dataset

from ..data.collators import PreferenceCollator
from ..data.rows import read_pairs
from ..trainers.reflection_dpo import ReflectionDPOConfig, ReflectionDPOTrainer
from . import check_files, load_start, remember_recipe, subsampled, train_source, training_image_root

CONFIG = ReflectionDPOConfig


def build(recipe: dict, model_args, data_args, args) -> ReflectionDPOTrainer:
    """Model, data and trainer of a recipe, ready for `train()`; `train_file` holds preference rows."""
    check_files(
        data_args, "the preference rows", "half a pair cannot be left out. Correct or remove the row."
    )
    start = load_start(model_args, args)
    eval_file = data_args.eval_file
    trainer = ReflectionDPOTrainer(
        start.model,
        None,
        args,
        data_collator=PreferenceCollator(
            start.processor,
            args.image_weight,
            args.image_crop,
            args.seed,
            image_root=training_image_root(data_args),
            max_length=args.max_length,
        ),
        train_dataset=Dataset.from_list(subsampled(read_pairs(train_source(data_args)), data_args)),
        eval_dataset=Dataset.from_list(read_pairs(eval_file)) if eval_file else None,
        processing_class=start.processor,
        peft_config=start.peft_config,
    )
    remember_recipe(trainer, recipe, model_args, data_args, args)
    return trainer
