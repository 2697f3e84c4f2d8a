"""Settings of `VerificationSFTTrainer`."""

from dataclasses import dataclass, field

import torch
from trl import SFTConfig

from .packing import PackingSettings


@dataclass
class VerificationSFTConfig(PackingSettings, SFTConfig):
    """TRL's `SFTConfig` with defaults that are safe for images, plus the settings of verification training.

    Different from TRL: `max_length` None (TRL's 1024 cuts targets off behind the image tokens without a word; here a
    limit makes longer rows an error), `remove_unused_columns` False, `bf16` only where a GPU has it.
    """

    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest row in tokens, images included. A longer row is an error, never cut. None: no limit."
        },
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Must stay false: the collator reads the raw columns."}
    )
    close_tag_weight: float = field(
        default=1.0,
        metadata={"help": "Factor on the loss of `</CN>` and `</UN>`. 1 is the published loss."},
    )
    hint_probability: float = field(
        default=0.2,
        metadata={
            "help": "Probability that a row's hint is added to its question, for `general_answer` turns that have one. "
            "0.2 is the published value; it teaches the model to use the hints of query rewriting."
        },
    )
    projector_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the projector. None: the same as `learning_rate`."},
    )
    verdict_metrics: bool = field(
        default=True,
        metadata={
            "help": "Log verdict accuracy, P(</UN>) at both kinds of closing tags, and their ROC area."
        },
    )

    def __post_init__(self):
        if self.bf16 is None and not self.fp16:
            self.bf16 = not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        super().__post_init__()
