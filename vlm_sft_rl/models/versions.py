"""What differs between the supported releases of transformers. Asked of the library itself, never of its number."""

from transformers import TrainingArguments
from transformers.modeling_outputs import BaseModelOutputWithPast

# the argument of a forward, and the field of its output, that holds keys and values: renamed in 5.24
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"

_OLD = "gradient_checkpointing"  # renamed in 5.23; TRL 1.16 and our recipes use the old name
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", _OLD) if name in TrainingArguments.__dataclass_fields__
)


def settle_checkpointing(config: TrainingArguments) -> None:
    """Before transformers' `__post_init__`: hand on what stands under the old name, where it is deprecated.

    TRL's default stands there, so that without this every config would warn.
    """
    for suffix in ("", "_kwargs"):
        if getattr(config, CHECKPOINTING + suffix) is None:
            setattr(config, CHECKPOINTING + suffix, getattr(config, _OLD + suffix))
