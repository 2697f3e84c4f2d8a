"""LLaVA-SCo: a recipe and its files to a `SelfCorrectionSFTTrainer`. The model needs no verification tokens."""

from ..dry_run import Plan
from ..trainers.self_correction_sft import (
    SelfCorrectionSFTConfig,
    SelfCorrectionSFTTrainer,
    build_correction_collator,
)
from . import row_sft

CONFIG = SelfCorrectionSFTConfig


def build(recipe: dict, model_args, data_args, args) -> SelfCorrectionSFTTrainer:
    """Model, data and trainer of a recipe, ready for `train()`."""
    return row_sft.build(
        SelfCorrectionSFTTrainer, build_correction_collator, recipe, model_args, data_args, args
    )


def plan(recipe: dict, model_args, data_args, args) -> Plan:
    """What `build` would make, with the model on the meta device."""
    return row_sft.plan(build_correction_collator, model_args, data_args, args)
