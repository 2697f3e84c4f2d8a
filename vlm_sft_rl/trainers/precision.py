"""The precision that our training arguments choose where nobody says one."""

import os

import torch
from transformers import TrainingArguments

_LAUNCHER = "ACCELERATE_MIXED_PRECISION"


def choose_bf16(args: TrainingArguments) -> None:
    """Settle `bf16` and `fp16`, so that they alone say what a run computes in. Called before the arguments' own
    `__post_init__`, which takes the launcher's precision wherever both are off.

    Where `bf16` is None and `fp16` off: float16 if the launcher's config asks for it, else bfloat16 on a GPU that has it,
    else neither. `bf16: false` means it: no launcher's precision comes back. Where neither is on, the launcher's word, an
    environment variable, is "no" from then on.
    """
    launched_with = os.environ.get(_LAUNCHER)
    on_gpu = not args.use_cpu and torch.cuda.is_available()
    if args.bf16 is None:
        args.fp16 = args.fp16 or (on_gpu and launched_with == "fp16")
        args.bf16 = on_gpu and not args.fp16 and torch.cuda.is_bf16_supported()
    if not args.bf16 and not args.fp16 and launched_with in ("bf16", "fp16"):
        os.environ[_LAUNCHER] = "no"
