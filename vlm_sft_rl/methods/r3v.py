"""R3V self-training: one recipe for the loop (`vlm-sft-rl self-train`) and for the SFT of each of its rounds."""

from dataclasses import dataclass

from ..self_training.config import SelfTrainingConfig
from ..trainers.mixture_sft import VisionSFTConfig
from . import sft


@dataclass
class R3VConfig(SelfTrainingConfig, VisionSFTConfig):
    """The loop's settings and those of the SFT in each round."""


CONFIG = R3VConfig


def build(recipe: dict, model_args, data_args, args):
    """One round by hand: SFT on `train_file`, a mixture that the loop has written. Ready for `train()`."""
    return sft.build(recipe, model_args, data_args, args)


def plan(recipe: dict, model_args, data_args, args):
    """What `build` would make, with the model on the meta device."""
    return sft.plan(recipe, model_args, data_args, args)
