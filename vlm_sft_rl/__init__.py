"""TRL-based post-training that teaches vision-language models to check and correct themselves.

The public names are imported when they are first used, so that `import vlm_sft_rl` is instant.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Answer": "decoding.answers",
    "ChatRequest": "teacher",
    "EndpointClient": "teacher",
    "MixtureSFTConfig": "trainers.mixture_sft",
    "MixtureSFTTrainer": "trainers.mixture_sft",
    "ReflectionDPOConfig": "trainers.reflection_dpo",
    "ReflectionDPOTrainer": "trainers.reflection_dpo",
    "RetrospectiveConfig": "decoding.config",
    "SamplingConfig": "decoding.config",
    "SCTuneConfig": "trainers.sc_tune.config",
    "SCTuneTrainer": "trainers.sc_tune.trainer",
    "UserError": "errors",
    "VerificationSFTConfig": "trainers.verification_sft",
    "VerificationSFTTrainer": "trainers.verification_sft",
    "VisionCollator": "data.collators",
    "VisionGRPOConfig": "trainers.grpo",
    "VisionGRPOTrainer": "trainers.grpo",
    "add_verification_tokens": "models.tokens",
    "build_collator": "trainers.verification_sft",
    "convert": "data.convert",
    "evaluate_spec": "evaluation.runner",
    "generate_plain": "decoding",
    "generate_retrospective": "decoding",
    "load_for_inference": "models.load",
    "load_train_rows": "data.index",
    "merge": "models.checkpoints",
    "on_policy_rows": "data.tagging.build",
    "prepare": "models.checkpoints",
    "read_rows": "data.rows",
    "sample_many": "decoding",
    "synthetic_rows": "data.tagging.build",
    "validate": "data.validate",
    "verification_mark": "data.marks",
    "write_trace_html": "decoding.trace",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
