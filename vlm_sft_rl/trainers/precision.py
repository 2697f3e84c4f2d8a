"""The precision that our training arguments choose where nobody says one."""

import os

import torch
from transformers import TrainingArguments

_LAUNCHER = "ACCELERATE_MIXED_PRECISION"


def choose_bf16(args: TrainingArguments) -> None:
    """Set `bf16` where it is open and `fp16` is off: on a GPU that has bfloat16, and nowhere else.

    Where both are off, no autocast that the launcher's config asks for comes back in their place: transformers would take
    it over `bf16: false`. Before the arguments' own `__post_init__`, which reads it.
    """
    if args.bf16 is None and not args.fp16:
        args.bf16 = not args.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    if not args.bf16 and not args.fp16 and os.environ.get(_LAUNCHER) in ("bf16", "fp16"):
        os.environ[_LAUNCHER] = "no"
