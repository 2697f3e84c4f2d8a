"""Model settings of a recipe."""

from dataclasses import dataclass, field

from trl import ModelConfig


@dataclass
class VLMModelConfig(ModelConfig):
    """TRL's model settings plus those of vision-language models."""

    dtype: str = field(
        default="auto",
        metadata={
            "help": "Weights' dtype. `auto`: float32 on CPU; on a GPU bfloat16 with LoRA, QLoRA or DeepSpeed, and "
            "float32 (under bf16 autocast) for full training without DeepSpeed, because small updates vanish in "
            "plain bfloat16 weights.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    freeze_vision: bool = field(default=True, metadata={"help": "Do not train the vision tower."})
    freeze_language: bool = field(
        default=False, metadata={"help": "Do not train the language model (full training only)."}
    )
    train_projector: bool = field(
        default=True,
        metadata={"help": "Train the projector in full, with LoRA too (saved inside of the adapter)."},
    )
    train_new_tokens: bool = field(
        default=True,
        metadata={
            "help": "With LoRA: train the verification tokens' rows in the input and the output embedding."
        },
    )
    min_pixels: int | None = field(
        default=None, metadata={"help": "Smallest image area in pixels, for processors that resize by area."}
    )
    max_pixels: int | None = field(
        default=None, metadata={"help": "Largest image area in pixels, for processors that resize by area."}
    )
