"""Settings of `VerificationSFTTrainer`."""

from dataclasses import dataclass, field

from .row_sft_config import RowSFTConfig


@dataclass
class VerificationSFTConfig(RowSFTConfig):
    """`RowSFTConfig` plus the settings of verification training."""

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
    verdict_metrics: bool = field(
        default=True,
        metadata={
            "help": "Log verdict accuracy, P(</UN>) at both kinds of closing tags, and their ROC area."
        },
    )
