"""Image features that no update changes: encoded once, used in every pass over the same picture.

transformers takes them through the argument `mm_encoder_outputs`, with which `generate` itself keeps them between prefill
and decoding. What is encoded is whatever the family puts before its language model: tower, projector, deepstack levels.
"""

import inspect
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .freeze import LANGUAGE, part_of

PIXELS = ("pixel_values", "pixel_attention_mask")


@dataclass(frozen=True)
class EncodedImage:
    """What a family's `get_image_features` made of one picture.

    Attributes:
        pooled: (tokens, hidden) what takes the place of the image tokens.
        levels: per deepstack level (tokens, hidden).
        stacked: the family wants the pictures of a batch as one tensor, not as a list.
        kind: an output of the family without tensors.
    """

    pooled: torch.Tensor
    levels: tuple[torch.Tensor, ...]
    stacked: bool
    kind: Any


def encodes_once(model: nn.Module) -> bool:
    """Whether features stay valid from update to update: nothing before the language model is trained or random, and
    the family takes them."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "mm_encoder_outputs" not in inspect.signature(plain.forward).parameters:
        return False
    if any(p.requires_grad for name, p in plain.named_parameters() if part_of(name) != LANGUAGE):
        return False
    return not any(
        isinstance(module, nn.Dropout) and module.p > 0 and part_of(name) != LANGUAGE
        for name, module in plain.named_modules()
    )


@torch.no_grad()
def encode_images(model: nn.Module, inputs: dict[str, Any], count: int) -> list[EncodedImage] | None:
    """Encode the pictures of a processor's `inputs`.

    Args:
        model: the transformers model, not a PEFT wrapper.
        count: how many pictures there are.

    Returns:
        One `EncodedImage` a picture; None where the family's output cannot be told apart by picture.
    """
    encode = model.base_model.get_image_features
    known = inspect.signature(encode).parameters
    output = encode(**{name: value for name, value in inputs.items() if name in known}, return_dict=True)
    pooled = output.pooler_output
    if len(pooled) != count:
        return None
    levels = getattr(output, "deepstack_features", None) or []
    kind = type(output)()
    stacked = torch.is_tensor(pooled)
    return [EncodedImage(pooled[i], tuple(level[i] for level in levels), stacked, kind) for i in range(count)]


def with_images(inputs: dict[str, Any], images: Sequence[EncodedImage]) -> dict[str, Any]:
    """A processor's `inputs` in which encoded pictures, in this order, stand for the pixels."""
    first = images[0]
    output = copy(first.kind)
    pooled = [image.pooled for image in images]
    output.pooler_output = torch.stack(pooled) if first.stacked else pooled
    if first.levels:
        output.deepstack_features = [[image.levels[i] for image in images] for i in range(len(first.levels))]
    kept = {name: value for name, value in inputs.items() if name not in PIXELS}
    return kept | {"mm_encoder_outputs": {"image": output}}
