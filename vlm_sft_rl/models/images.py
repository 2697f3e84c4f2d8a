"""Image features that no update changes: encoded once, used in every pass over the same picture.

transformers takes them through the argument `mm_encoder_outputs`, with which `generate` itself keeps them between prefill
and decoding. What is encoded is whatever the family puts before its language model: tower, projector, deepstack levels.
Where the projector is trained, what it reads is kept instead, and it runs anew in every pass.
"""

import inspect
from collections.abc import Iterator, Sequence
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
    projectors = {
        name: module
        for name, module in _projectors(plain).items()
        if any(p.requires_grad for p in module.parameters())
    }
    # by structure, not by name: a projector of an unknown name is no part of the decoder
    language = (plain.get_decoder(), plain.get_input_embeddings(), plain.get_output_embeddings())
    behind = {id(m) for part in language if part is not None for m in part.modules()}
    own = {id(p) for part in language if part is not None for p in part.parameters()}
    anew = {id(m) for projector in projectors.values() for m in projector.modules()}
    anew_own = {id(p) for projector in projectors.values() for p in projector.parameters()}
    for name, parameter in plain.named_parameters():
        changes = id(parameter) not in own or part_of(name) != LANGUAGE
        if parameter.requires_grad and changes and id(parameter) not in anew_own:
            return None
    random = any(
        _drops(module)
        for name, module in plain.named_modules()
        if id(module) not in anew and (id(module) not in behind or part_of(name) != LANGUAGE)
    )
    return None if random else list(projectors)


def _projectors(model: nn.Module) -> dict[str, nn.Module]:
    try:
        return {name: model.get_submodule(name) for name in projector_modules(model)}
    except UserError:
        return {}


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
        pictures = [[_unprojected(rows, calls) for rows in own] for own in pictures]
        found = [one for own in pictures for one in own]
        # a trained module whose rows are no features feeds another one, and what that reads goes stale
        if None in found or {one.projector for one in found} != set(projectors):
            return None
    kind, stacked = type(output)(), torch.is_tensor(pooled)
    return [EncodedImage(first, tuple(levels), stacked, kind) for first, *levels in pictures]


def _by_picture(part: Any, count: int) -> bool:
    return (
        isinstance(part, torch.Tensor | list | tuple)
        and len(part) == count
        and all(torch.is_tensor(one) for one in part)
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
            (begin, over), (until, rest) = (
                divmod((row - call.first) * len(call.read), call.rows) for row in (start, end)
            )
            return None if over or rest else Unprojected(call.projector, call.read[begin:until], rows - start)
    return None


@torch.no_grad()
def takes_images(model: nn.Module, inputs: dict[str, Any], images: Sequence[EncodedImage]) -> bool:
    """Whether a pass over encoded pictures is the pass over the pixels: a family may read more than is kept of them."""

    def last_logits(side):
        return model(**side, use_cache=False, logits_to_keep=1).logits[:, -1].float()

    one = last_logits(inputs)
    try:
        other = last_logits(with_images(model, inputs, images))
    except (TypeError, ValueError):  # a family that names the argument and wants the pixels beside it
        return False
    return float((one - other).abs().max()) <= tolerance(model, 1e-5) * float(one.abs().max())


def with_images(model: nn.Module, inputs: dict[str, Any], images: Sequence[EncodedImage]) -> dict[str, Any]:
    """A processor's `inputs` in which encoded pictures, in this order, stand for the pixels.

    Args:
        model: whose projector runs where one is trained; wrapped by PEFT, DDP or DeepSpeed, or not.
    """
    first, model = images[0], unwrap(extract_model_from_parallel(model))
    output = copy(first.kind)
    pooled = [_features(image.pooled, model) for image in images]
    output.pooler_output = torch.stack(pooled) if first.stacked else pooled
    if first.levels:
        output.deepstack_features = [
            [_features(image.levels[i], model) for image in images] for i in range(len(first.levels))
        ]
    kept = {name: value for name, value in inputs.items() if not is_pixels(name)}
    return kept | {"mm_encoder_outputs": {"image": output}}


def _features(part: torch.Tensor | Unprojected, model: nn.Module) -> torch.Tensor:
    return part if torch.is_tensor(part) else part.features(model)
