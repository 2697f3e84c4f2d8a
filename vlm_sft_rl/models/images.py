"""Image features that no update changes: encoded once, used in every pass over the same picture.

transformers takes them through the argument `mm_encoder_outputs`, with which `generate` itself keeps them between prefill
and decoding. What is encoded is whatever the family puts before its language model: tower, projector, deepstack levels.
Where the projector is trained, what it reads is kept instead, and it runs anew in every pass.
"""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from ..errors import UserError
from .parts import LANGUAGE, part_of, projector_modules, tolerance, unwrap


@dataclass(frozen=True)
class Unprojected:
    """What a trained projector reads of one picture.

    Attributes:
        projector: its name in the transformers model.
        read: its argument, with the part of this picture in the first dimension.
        order: (tokens,) which rows of its output make the picture's features, one after the other.
    """

    projector: str
    read: torch.Tensor
    order: torch.Tensor

    def features(self, model: nn.Module) -> torch.Tensor:
        """(tokens, hidden) with the weights that the projector of `model` has now; gradients reach them."""
        return model.get_submodule(self.projector)(self.read).flatten(0, -2)[self.order]


@dataclass(frozen=True)
class EncodedImage:
    """What a family's `get_image_features` made of one picture.

    Attributes:
        pooled: (tokens, hidden) what takes the place of the image tokens.
        levels: per deepstack level of Qwen3-VL (tokens, hidden).
        stacked: the family wants the pictures of a batch as one tensor, not as a list.
        kind: an output of the family without tensors.
    """

    pooled: torch.Tensor | Unprojected
    levels: tuple[torch.Tensor | Unprojected, ...]
    stacked: bool
    kind: Any


def is_pixels(name: str) -> bool:
    """Whether a processor's tensor of this name is read by the tower alone."""
    return "pixel" in name


def trained_projectors(model: nn.Module) -> list[str] | None:
    """Names of the projectors that updates change; None where no features stay valid from update to update: other things
    before the language model are trained or random, or the family takes no features."""
    plain = unwrap(model)
    if "mm_encoder_outputs" not in inspect.signature(plain.forward).parameters:
        return None
    try:
        modules = {name: plain.get_submodule(name) for name in projector_modules(plain)}
    except UserError:  # the family has none, or none of a known name
        modules = {}
    projectors = {n: m for n, m in modules.items() if any(p.requires_grad for p in m.parameters())}
    anew = _contents(projectors.values())
    # by structure, not by name: a projector of an unknown name is no part of the decoder
    decoder = _contents([plain.get_decoder(), plain.get_input_embeddings(), plain.get_output_embeddings()])

    def runs_once(name: str, item: nn.Module | nn.Parameter) -> bool:
        """It stands before the language model, and what it makes would be kept for later passes."""
        return id(item) not in anew and (id(item) not in decoder or part_of(name) != LANGUAGE)

    trained = any(p.requires_grad and runs_once(name, p) for name, p in plain.named_parameters())
    random = any(_drops(module) and runs_once(name, module) for name, module in plain.named_modules())
    return None if trained or random else list(projectors)


def _contents(modules: Iterable[nn.Module | None]) -> set[int]:
    """Identities of all modules and parameters in them."""
    present = [module for module in modules if module is not None]
    return {id(item) for module in present for item in (*module.modules(), *module.parameters())}


def _drops(module: nn.Module) -> bool:
    """Dropout as a module, or as the number that many attentions hold."""
    numbers = [value for name, value in vars(module).items() if "drop" in name]
    numbers += [module.p] if isinstance(module, nn.Dropout) else []
    return any(isinstance(value, float) and value > 0 for value in numbers)


@torch.no_grad()
def encode_images(
    model: nn.Module, inputs: dict[str, Any], count: int, projectors: Sequence[str] = ()
) -> list[EncodedImage] | None:
    """Encode the pictures of a processor's `inputs`.

    Args:
        model: the transformers model, not a PEFT wrapper.
        count: how many pictures there are.
        projectors: those that are to run anew in every pass (`trained_projectors`).

    Returns:
        One `EncodedImage` a picture; None where the family's output cannot be told apart by picture, as with tiles, or is
        more than rows that the projectors give.
    """
    pixels = inputs.get("pixel_values")
    if pixels is None or (pixels.ndim == 4 and len(pixels) != count):
        return None
    if pixels.ndim == 5 and pixels.shape[1] > 1 and "image_sizes" not in inputs:
        return None
    encode = model.base_model.get_image_features
    known = inspect.signature(encode).parameters
    with _numbered(model, projectors) as calls:
        output = encode(**{name: value for name, value in inputs.items() if name in known}, return_dict=True)
    pooled = getattr(output, "pooler_output", None)
    parts = [pooled, *(getattr(output, "deepstack_features", None) or [])]
    if not all(_by_picture(part, count) for part in parts):
        return None
    pictures = [[part[i] for part in parts] for i in range(count)]
    if projectors:
        pictures = [[_unprojected(rows, calls) for rows in features] for features in pictures]
        used = {piece and piece.projector for features in pictures for piece in features}
        # a trained module whose rows are no features feeds another one, and what that reads goes stale
        if used != set(projectors):
            return None
    kind, stacked = type(output)(), torch.is_tensor(pooled)
    return [EncodedImage(first, tuple(levels), stacked, kind) for first, *levels in pictures]


def _by_picture(part: Any, count: int) -> bool:
    return (
        isinstance(part, torch.Tensor | list | tuple)
        and len(part) == count
        and all(torch.is_tensor(features) for features in part)
    )


@dataclass(frozen=True)
class _Call:
    """A projector's run: what it read, and the number of its first row, of `rows`."""

    projector: str
    read: torch.Tensor
    first: int
    rows: int


@contextmanager
def _numbered(model: nn.Module, projectors: Sequence[str]) -> Iterator[list[_Call]]:
    """Within it projectors give, for each row of their output, its number: what a family does with the rows shows which
    of them become which picture's."""
    calls: list[_Call] = []

    def number(name, module, args, kwargs, output):
        if kwargs or len(args) != 1 or not torch.is_tensor(output):
            return None
        first = calls[-1].first + calls[-1].rows if calls else 0
        rows = output.shape[:-1].numel()
        calls.append(_Call(name, args[0].detach(), first, rows))
        # numbers beyond 256 are none in bfloat16
        numbers = torch.arange(first, first + rows, dtype=torch.float32, device=output.device)
        return numbers.view(*output.shape[:-1], 1).expand(output.shape)

    hooks = [
        model.get_submodule(name).register_forward_hook(partial(number, name), with_kwargs=True)
        for name in projectors
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _unprojected(numbers: torch.Tensor, calls: list[_Call]) -> Unprojected | None:
    """Whose rows a picture's features (tokens, hidden) are; None where they are not the rows of one stretch of a call."""
    rows = numbers[:, 0].long()
    if not torch.equal(numbers, rows[:, None].to(numbers).expand_as(numbers)):
        return None
    start, end = int(rows.min()), int(rows.max()) + 1
    if not torch.equal(rows.sort().values, torch.arange(start, end, device=rows.device)):
        return None
    for call in calls:
        if call.first <= start and end <= call.first + call.rows:
            # a projector's rows stand in the order of what they were made of
            begin, rest = divmod((start - call.first) * len(call.read), call.rows)
            until, over = divmod((end - call.first) * len(call.read), call.rows)
            return None if rest or over else Unprojected(call.projector, call.read[begin:until], rows - start)
    return None


@torch.no_grad()
def takes_images(model: nn.Module, inputs: dict[str, Any], images: Sequence[EncodedImage]) -> bool:
    """Whether a pass over encoded pictures is the pass over the pixels: a family may read more than is kept of them."""
    settings = {"use_cache": False, "logits_to_keep": 1}
    over_pixels = model(**inputs, **settings).logits[:, -1].float()
    try:
        over_images = model(**with_images(model, inputs, images), **settings).logits[:, -1].float()
    except (TypeError, ValueError):  # a family that names the argument and wants the pixels beside it
        return False
    difference = float((over_pixels - over_images).abs().max())
    return difference <= tolerance(model, 1e-5) * float(over_pixels.abs().max())


def with_images(model: nn.Module, inputs: dict[str, Any], images: Sequence[EncodedImage]) -> dict[str, Any]:
    """A processor's `inputs` in which encoded pictures, in this order, stand for the pixels.

    Args:
        model: whose projector runs where one is trained; wrapped by PEFT, DDP or DeepSpeed, or not.
    """
    model = unwrap(extract_model_from_parallel(model))
    pooled, *levels = [
        [part if torch.is_tensor(part) else part.features(model) for part in parts]
        for parts in zip(*[(image.pooled, *image.levels) for image in images], strict=True)
    ]
    output = copy(images[0].kind)
    output.pooler_output = torch.stack(pooled) if images[0].stacked else pooled
    if levels:
        output.deepstack_features = levels
    rest = {name: value for name, value in inputs.items() if not is_pixels(name)}
    return rest | {"mm_encoder_outputs": {"image": output}}
