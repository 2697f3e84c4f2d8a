"""What cannot work is refused before any weight is read: by the checkpoint's config, with what to use instead."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from ..errors import UserError

CONVERT = "Convert it: `vlm-sft-rl model convert SOURCE TARGET --vision-tower TOWER`."
# model types that transformers does not build, and what to use instead
INSTEAD = {
    "qwen": "Qwen-VL and Qwen-VL-Chat run code of transformers 4 from the checkpoint. Use Qwen2-VL or newer, for "
    "example Qwen/Qwen2.5-VL-3B-Instruct.",
    "internvl_chat": "Use the same model in the transformers form, for example OpenGVLab/InternVL3-8B-hf.",
    "llava_llama": f"It is in the original LLaVA format. {CONVERT}",
    "llava_mistral": f"It is in the original LLaVA format. {CONVERT}",
    "minicpmv": "Use a family that transformers builds itself, see docs/families.md.",
    "phi3_v": "Use a family that transformers builds itself, see docs/families.md.",
}
BIDIRECTIONAL = ("paligemma",)


def read_config(path: str | Path, **kwargs) -> dict[str, Any] | None:
    """The raw config of a checkpoint, None when there is none to read (the loader will say what is missing)."""
    try:
        config, _ = PreTrainedConfig.get_config_dict(path, **kwargs)
    except (OSError, ValueError):
        return None
    return config or None


def check_loadable(path: str | Path, config: dict[str, Any] | None) -> None:
    """Refuse what transformers does not build as a vision-language model.

    Raises:
        UserError: the checkpoint needs code of its own, or is a text model, or another kind of model.
    """
    model_type = (config or {}).get("model_type")
    if model_type == "llava" and "mm_vision_tower" in config:
        model_type = "llava_llama"  # LLaVA-1.5's authors use the name that transformers took over
    if model_type is None or model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return
    if model_type in INSTEAD:
        raise UserError(f"{path}: models of type {model_type!r} are not supported. {INSTEAD[model_type]}")
    if model_type not in CONFIG_MAPPING:
        code = (
            "needs code from the checkpoint, which is never run" if config.get("auto_map") else "is unknown"
        )
        raise UserError(
            f"{path}: model type {model_type!r} {code} here. Use a family that transformers builds itself, see "
            "docs/families.md."
        )
    raise UserError(
        f"{path}: {model_type!r} is not a vision-language model. Use a checkpoint that takes images and text, see "
        "docs/families.md."
    )


def check_trainable(path: str | Path, config: dict[str, Any] | None) -> None:
    """Refuse families that load and decode but cannot be trained on conversations.

    Raises:
        UserError: an encoder-decoder model, or one that attends to its whole input in both directions.
    """
    config = config or {}
    model_type = config.get("model_type")
    text = config.get("text_config") or {}
    if config.get("is_encoder_decoder") or text.get("is_encoder_decoder"):
        raise UserError(
            f"{path}: {model_type!r} is an encoder-decoder model. Decoder-only models can be trained, see "
            "docs/families.md."
        )
    if model_type in BIDIRECTIONAL:
        raise UserError(
            f"{path}: {model_type!r} attends to its prompt in both directions, and its processor does not say where "
            "the prompt of a conversation ends, so an answer could see itself. Use another family, see "
            "docs/families.md."
        )
