"""Plain SFT on rows: a recipe and its files to a `VisionSFTTrainer`. The model needs no verification tokens."""

from ..dry_run import Plan
from ..trainers.mixture_sft import VisionSFTConfig, VisionSFTTrainer, build_kind_collator
from . import row_sft

CONFIG = VisionSFTConfig


def build(recipe: dict, model_args, data_args, args) -> VisionSFTTrainer:
    """Model, data and trainer of a recipe, ready for `train()`."""
    return row_sft.build(VisionSFTTrainer, build_kind_collator, recipe, model_args, data_args, args)


def plan(recipe: dict, model_args, data_args, args) -> Plan:
    """What `build` would make, with the model on the meta device."""
    return row_sft.plan(build_kind_collator, model_args, data_args, args)
