"""The precision that our training arguments choose where nobody says one."""

import torch
from transformers import TrainingArguments


def choose_bf16(args: TrainingArguments) -> None:
    """Set `bf16` where it is open and `fp16` is off: on a GPU that has bfloat16, and nowhere else."""
    if args.bf16 is None and not args.fp16:
        args.bf16 = not args.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
