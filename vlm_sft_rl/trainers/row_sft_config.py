"""Settings that all SFT trainers on raw rows share."""

from dataclasses import dataclass, field

from trl import SFTConfig

from .packing import PackingSettings
from .precision import choose_bf16


@dataclass
class RowSFTConfig(PackingSettings, SFTConfig):
    """TRL's `SFTConfig` with defaults that are safe for images.

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
    projector_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the projector. None: the same as `learning_rate`."},
    )

    def __post_init__(self):
        choose_bf16(self)
        super().__post_init__()
