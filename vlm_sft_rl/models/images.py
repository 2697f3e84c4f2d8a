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
from .unwrap import unwrap


@dataclass(frozen=True)
class EncodedImage:
    """What a family's `get_image_features` made of one picture.

    Attributes:
        pooled: (tokens, hidden) what takes the place of the image tokens.
        levels: per deepstack level of Qwen3-VL (tokens, hidden).
        stacked: the family wants the pictures of a batch as one tensor, not as a list.
        kind: an output of the family without tensors.
    """

    pooled: torch.Tensor
    levels: tuple[torch.Tensor, ...]
    stacked: bool
    kind: Any


def is_pixels(name: str) -> bool:
    """Whether a processor's tensor of this name is read by the tower alone."""
    return "pixel" in name


def encodes_once(model: nn.Module) -> bool:
    """Whether features stay valid from update to update: nothing outside of the language model is trained or random, and
    the family takes them."""
    plain = unwrap(model)
    if "mm_encoder_outputs" not in inspect.signature(plain.forward).parameters:
        return False
    # by structure, not by name: a projector of an unknown name is no part of the decoder
    language = (plain.get_decoder(), plain.get_input_embeddings(), plain.get_output_embeddings())
    behind = {id(m) for part in language if part is not None for m in part.modules()}
    own = {id(p) for part in language if part is not None for p in part.parameters()}
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad and (id(parameter) not in own or part_of(name) != LANGUAGE):
            return False
    return not any(
        _drops(module)
        for name, module in plain.named_modules()
        if id(module) not in behind or part_of(name) != LANGUAGE
    )


def _drops(module: nn.Module) -> bool:
    """Dropout as a module, or as the number that many attentions hold."""
    numbers = [value for name, value in vars(module).items() if "drop" in name]
    numbers += [module.p] if isinstance(module, nn.Dropout) else []
    return any(isinstance(value, float) and value > 0 for value in numbers)


@torch.no_grad()
def encode_images(model: nn.Module, inputs: dict[str, Any], count: int) -> list[EncodedImage] | None:
    """Encode the pictures of a processor's `inputs`.

    Args:
        model: the transformers model, not a PEFT wrapper.
        count: how many pictures there are.

    Returns:
        One `EncodedImage` a picture; None where the family's output cannot be told apart by picture, as with tiles.
    """
    pixels = inputs.get("pixel_values")
    if pixels is None or (pixels.ndim == 4 and len(pixels) != count):
        return None
    if pixels.ndim == 5 and pixels.shape[1] > 1 and "image_sizes" not in inputs:
        return None
    encode = model.base_model.get_image_features
    known = inspect.signature(encode).parameters
    output = encode(**{name: value for name, value in inputs.items() if name in known}, return_dict=True)
    pooled = getattr(output, "pooler_output", None)
    levels = getattr(output, "deepstack_features", None) or []
    if not all(_by_picture(part, count) for part in (pooled, *levels)):
        return None
    kind, stacked = type(output)(), torch.is_tensor(pooled)
    return [EncodedImage(pooled[i], tuple(level[i] for level in levels), stacked, kind) for i in range(count)]


def _by_picture(part: Any, count: int) -> bool:
    return (
        isinstance(part, torch.Tensor | list | tuple)
        and len(part) == count
        and all(torch.is_tensor(one) for one in part)
    )


@torch.no_grad()
def takes_images(model: nn.Module, inputs: dict[str, Any], images: Sequence[EncodedImage]) -> bool:
    """Whether a pass over encoded pictures is the pass over the pixels: a family may read more than is kept of them."""
    sides = (inputs, with_images(inputs, images))
    one, other = (model(**side, use_cache=False, logits_to_keep=1).logits[:, -1].float() for side in sides)
    tolerance = 1e-5 if model.dtype == torch.float32 else 0.05
    return float((one - other).abs().max()) <= tolerance * float(one.abs().max())


def with_images(inputs: dict[str, Any], images: Sequence[EncodedImage]) -> dict[str, Any]:
    """A processor's `inputs` in which encoded pictures, in this order, stand for the pixels."""
    first = images[0]
    output = copy(first.kind)
    pooled = [image.pooled for image in images]
    output.pooler_output = torch.stack(pooled) if first.stacked else pooled
    if first.levels:
        output.deepstack_features = [[image.levels[i] for image in images] for i in range(len(first.levels))]
    kept = {name: value for name, value in inputs.items() if not is_pixels(name)}
    return kept | {"mm_encoder_outputs": {"image": output}}
