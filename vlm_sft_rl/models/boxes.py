"""How each model family writes a box, and back: text <-> (x1, y1, x2, y2) in pixels of the original image.

Sizes are (width, height). `resized` is the size that the processor fed to the vision tower; only conventions with
`needs_resized` use it (see `resized_sizes`).
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import UserError

Box = tuple[float, float, float, float]
Size = tuple[float, float]

# numbers of more digits are noise, and Python refuses to read very long ones
INTEGER = r"-?\d{1,6}"
DECIMAL = r"-?\d{0,6}(?:\.\d{1,12}|\d)"


def _list_of(number: str) -> str:
    return r"\[\s*" + r"\s*,\s*".join([f"({number})"] * 4) + r"\s*\]"


class BoxConvention(Protocol):
    """What a describer writes and a locator reads.

    Attributes:
        name: what recipes and the sidecar's `box_convention` call it.
        opening: the text with which every box begins, to force one at the end of a prompt; may be empty.
        needs_resized: whether the coordinates depend on the processor's resize.
    """

    name: str
    opening: str
    needs_resized: bool

    def format(self, box: Box, size: Size, resized: Size | None = None, label: str | None = None) -> str:
        """One box as text.

        Args:
            box: (x1, y1, x2, y2) in pixels of the original image; clipped to it.
            label: what stands there, for conventions that write it.

        Raises:
            UserError: the box is empty or outside the image, or `resized` is missing where it is needed.
        """

    def parse(self, text: str, size: Size, resized: Size | None = None) -> list[Box]:
        """Every box in a text, in order, clipped to the image; what is malformed or empty is left out.

        Raises:
            UserError: `resized` is missing where it is needed (never because of the text).
        """


@dataclass(frozen=True)
class Tags:
    """Numbers inside of tags. The tags are not asked for when reading: decoding may strip them as special tokens.

    Attributes:
        box: what a box looks like, with four `{}` for the numbers.
        label: what stands before a named box, with one `{}`.
        pattern: matches the numbers of one box, as four groups.
        opening: what stands before the first number.
    """

    box: str
    label: str
    pattern: str
    opening: str

    def write(self, numbers: Iterable[int], label: str | None) -> str:
        return (self.label.format(label) if label else "") + self.box.format(*numbers)


@dataclass(frozen=True)
class Json:
    """`{"bbox_2d": [x1, y1, x2, y2], "label": "…"}`; found in lists, in code fences and in lists cut short."""

    pattern: str = r'"bbox_2d"\s*:\s*' + _list_of(INTEGER)
    opening: str = '{"bbox_2d": ['

    def write(self, numbers: Iterable[int], label: str | None) -> str:
        return json.dumps(
            {"bbox_2d": list(numbers)} | ({"label": label} if label else {}), ensure_ascii=False
        )


@dataclass(frozen=True)
class GridBoxes:
    """Integers from 0 to `top` on both axes, relative to the whole image.

    Attributes:
        top: the number that stands for the right and the lower edge.
        floor: round down, as Qwen-VL's and SC-Tune's data were written; else to the nearest.
    """

    name: str
    style: Tags | Json
    top: int
    floor: bool = False
    needs_resized: bool = False

    @property
    def opening(self) -> str:
        return self.style.opening

    def format(self, box, size, resized=None, label=None):
        scale = (self.top, self.top)
        scaled = _scale(_clipped(box, size), size, scale)
        return self.style.write(_whole(scaled, scale, int if self.floor else round), label)

    def parse(self, text, size, resized=None):
        return _found(self.style.pattern, text, (self.top, self.top), size)


@dataclass(frozen=True)
class PixelBoxes:
    """Whole pixels of the resized image (Qwen2.5-VL)."""

    name: str
    style: Tags | Json
    needs_resized: bool = True

    @property
    def opening(self) -> str:
        return self.style.opening

    def format(self, box, size, resized=None, label=None):
        resized = self._resized(resized)
        return self.style.write(_whole(_scale(_clipped(box, size), size, resized), resized, round), label)

    def parse(self, text, size, resized=None):
        return _found(self.style.pattern, text, self._resized(resized), size)

    def _resized(self, resized: Size | None) -> Size:
        if resized is None:
            raise UserError(
                f"The box convention {self.name} counts pixels of the resized image: pass `resized`, "
                "see vlm_sft_rl.models.boxes.resized_sizes."
            )
        return resized


@dataclass(frozen=True)
class DecimalBoxes:
    """`[x1, y1, x2, y2]` as decimals from 0 to 1 (LLaVA, Shikra).

    Attributes:
        square: relative to the image padded to a square around its centre, as LLaVA-1.5 was trained
            (`image_aspect_ratio: pad`); else relative to the image itself.
    """

    name: str
    decimals: int = 2
    square: bool = False
    opening: str = "["
    needs_resized: bool = False

    def format(self, box, size, resized=None, label=None):
        side, left, top = self._frame(size)
        unit = 10**self.decimals
        clipped = _clipped(box, size)
        x1, y1, x2, y2 = (
            value + offset for value, offset in zip(clipped, (left, top, left, top), strict=True)
        )
        # the padding begins where the image ends: a box that began there would hold nothing of it
        ends = (math.ceil((left + size[0]) * unit / side[0]), math.ceil((top + size[1]) * unit / side[1]))
        whole = _whole(_scale((x1, y1, x2, y2), side, (unit, unit)), ends, round)
        text = ", ".join(f"{value / unit:.{self.decimals}f}" for value in whole)
        return f"{label} [{text}]" if label else f"[{text}]"

    def parse(self, text, size, resized=None):
        side, left, top = self._frame(size)
        boxes = []
        for numbers in re.findall(_list_of(DECIMAL), text):
            x1, y1, x2, y2 = (float(number) for number in numbers)
            if max(x1, y1, x2, y2) > 1:
                continue  # pixels or per mille: another convention
            box = _scale((x1, y1, x2, y2), (1, 1), side)
            boxes.append((box[0] - left, box[1] - top, box[2] - left, box[3] - top))
        return _kept(boxes, size)

    def _frame(self, size: Size) -> tuple[Size, float, float]:
        """The size of what the decimals refer to, and where the image begins in it."""
        if not self.square:
            return size, 0.0, 0.0
        side = max(size)
        return (side, side), (side - size[0]) / 2, (side - size[1]) / 2


@dataclass(frozen=True)
class CellBoxes:
    """Cells of a grid by name, one (`w1`) or the first and the last of a block (`w1-x2`): the pocket world's.

    Attributes:
        columns, rows: the letters from left to right, the digits from top to bottom.
    """

    name: str
    columns: str = "wxyz"
    rows: str = "1234"
    opening: str = ""
    needs_resized: bool = False

    def format(self, box, size, resized=None, label=None):
        grid = (len(self.columns), len(self.rows))
        x1, y1, x2, y2 = _scale(_clipped(box, size), size, grid)
        first = self._cell(x1, y1)
        # a box that ends on a line between two cells does not reach into the next
        last = self._cell(max(x1, _before(x2)), max(y1, _before(y2)))
        text = first if first == last else f"{first}-{last}"
        return f"{label} {text}" if label else text

    def parse(self, text, size, resized=None):
        cell = rf"([{self.columns}])([{self.rows}])"
        boxes = []
        for x1, y1, x2, y2 in re.findall(rf"\b{cell}(?:-{cell})?\b", text):
            column, row = self.columns.index(x1), self.rows.index(y1)
            end = (self.columns.index(x2 or x1) + 1, self.rows.index(y2 or y1) + 1)
            boxes.append(_scale((column, row, *end), (len(self.columns), len(self.rows)), size))
        return _kept(boxes, size)

    def _cell(self, x: float, y: float) -> str:
        column, row = min(int(x), len(self.columns) - 1), min(int(y), len(self.rows) - 1)
        return self.columns[column] + self.rows[row]


CORNERS = rf"\(\s*({INTEGER})\s*,\s*({INTEGER})\s*\)\s*,\s*\(\s*({INTEGER})\s*,\s*({INTEGER})\s*\)"
QWEN_VL = Tags("<box>({},{}),({},{})</box>", "<ref>{}</ref>", CORNERS, "<box>(")
QWEN2_VL = Tags(
    "<|box_start|>({},{}),({},{})<|box_end|>",
    "<|object_ref_start|>{}<|object_ref_end|>",
    CORNERS,
    "<|box_start|>(",
)
INTERNVL = Tags("<box>[[{}, {}, {}, {}]]</box>", "<ref>{}</ref>", _list_of(INTEGER), "<box>[[")
CONVENTIONS: dict[str, BoxConvention] = {
    convention.name: convention
    for convention in (
        GridBoxes("qwen-vl", QWEN_VL, 999, floor=True),
        GridBoxes("qwen2-vl", QWEN2_VL, 1000),
        PixelBoxes("qwen2.5-vl", Json()),
        GridBoxes("qwen3-vl", Json(), 1000),
        GridBoxes("internvl", INTERNVL, 1000),
        DecimalBoxes("llava"),
        DecimalBoxes("llava-pad", square=True),
        CellBoxes("pocket"),
    )
}
# config.model_type -> convention of the published checkpoints
BY_MODEL_TYPE = {
    "internvl": "internvl",
    "llava": "llava",
    "llava_next": "llava",
    "qwen": "qwen-vl",
    "qwen2_vl": "qwen2-vl",
    "qwen2_5_vl": "qwen2.5-vl",
    "qwen3_vl": "qwen3-vl",
    "qwen3_vl_moe": "qwen3-vl",
}


def convention_for(model: Any, name: str | None = None) -> BoxConvention:
    """The box convention of a model or its config.

    Args:
        model: anything with `config.model_type` or `model_type` (PEFT-wrapped models too).
        name: overrides the family's convention; the sidecar's `box_convention` belongs here.

    Raises:
        UserError: the name is unknown, or the family has no convention of its own and no name is given.
    """
    known = ", ".join(CONVENTIONS)
    if name is not None:
        if name not in CONVENTIONS:
            raise UserError(f"box_convention: {name!r} is unknown. Choose one of {known}.")
        return CONVENTIONS[name]
    model_type = getattr(getattr(model, "config", model), "model_type", None)
    if model_type not in BY_MODEL_TYPE:
        raise UserError(
            f"box_convention: models of type {model_type!r} have no way of their own to write boxes. Name one of "
            f"{known}; an untrained convention has to be taught by training data."
        )
    return CONVENTIONS[BY_MODEL_TYPE[model_type]]


def resized_sizes(features: Any, processor: Any) -> list[Size]:
    """(width, height) of every image after the processor's own resize, from what the processor returned.

    Args:
        features: the processor's output; `image_grid_thw` (images, 3) counts patches in time, height, width.

    Raises:
        UserError: the output has no grid, so that this processor's resize cannot be read off.
    """
    grids = features.get("image_grid_thw")
    if grids is None:
        raise UserError(
            f"{type(processor).__name__} returns no `image_grid_thw`: its resize cannot be told. Choose a box "
            "convention relative to the image."
        )
    patch = getattr(processor, "image_processor", processor).patch_size
    return [(int(width) * patch, int(height) * patch) for _, height, width in grids.tolist()]


def _clipped(box: Iterable[float], size: Size) -> Box:
    x1, y1, x2, y2 = box
    width, height = size
    clipped = (max(x1, 0), max(y1, 0), min(x2, width), min(y2, height))
    if not (clipped[0] < clipped[2] and clipped[1] < clipped[3]):
        raise UserError(
            f"The box {(x1, y1, x2, y2)} is empty inside of an image of {width}x{height} pixels. Expected x1 < x2 and "
            "y1 < y2 in pixels."
        )
    return clipped


def _scale(box: Iterable[float], old: Size, new: Size) -> Box:
    x1, y1, x2, y2 = box
    (old_w, old_h), (new_w, new_h) = old, new
    return (x1 * new_w / old_w, y1 * new_h / old_h, x2 * new_w / old_w, y2 * new_h / old_h)


def _whole(box: Box, limit: Size, rounding: Callable[[float], int]) -> tuple[int, int, int, int]:
    """Whole numbers with x1 < x2 and y1 < y2 inside of `limit`, however small the box is."""
    low, high = [], []
    for first, last, top in zip(box[:2], box[2:], limit, strict=True):
        start = min(rounding(first), int(top) - 1)
        low.append(start)
        high.append(max(start + 1, min(rounding(last), int(top))))
    return (*low, *high)


def _before(value: float) -> float:
    return value - 1 if value == int(value) else value


def _found(pattern: str, text: str, scale: Size, size: Size) -> list[Box]:
    boxes = ([float(number) for number in numbers] for numbers in re.findall(pattern, text))
    return _kept([_scale(box, scale, size) for box in boxes], size)


def _kept(boxes: Iterable[Box], size: Size) -> list[Box]:
    width, height = size
    clipped = [(max(x1, 0.0), max(y1, 0.0), min(x2, width), min(y2, height)) for x1, y1, x2, y2 in boxes]
    return [box for box in clipped if box[0] < box[2] and box[1] < box[3]]
