"""How each model family writes a box, and back: text <-> (x1, y1, x2, y2) in pixels of the original image.

Every convention is a row of `CONVENTIONS`: what the numbers refer to, how they are rounded, how they stand in a text. Sizes
are (width, height). `resized` is the size that the processor fed to the vision tower; only conventions with
`needs_resized` use it (see `resized_sizes`).
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserError

Box = tuple[float, float, float, float]
Size = tuple[float, float]


@dataclass(frozen=True)
class BoxConvention:
    """What a describer writes and a locator reads.

    Attributes:
        name: what recipes and the sidecar's `box_convention` call it.
        opening: the text with which every box begins, to force one at the end of a prompt; may be empty.
        pattern: matches one box in a text, its numbers as four groups. Tags are not part of it: decoding may strip them.
        write: the four numbers and a label or None -> text.
        read: the four groups -> the numbers; None where they are not of this convention.
        full: the number of the right and of the lower edge; None: both are those of the resized image.
        decimals: digits behind the point; 0: whole numbers.
        rounding: of the near and of the far edges.
        padded: relative to the image padded to a square around its centre, as LLaVA-1.5 was trained
            (`image_aspect_ratio: pad`); else to the image itself.
    """

    name: str
    opening: str
    pattern: str
    write: Callable[[Sequence[float], str | None], str]
    read: Callable[[Sequence[str]], Sequence[float] | None]
    full: int | None = None
    decimals: int = 0
    rounding: tuple[Callable[[float], int], Callable[[float], int]] = (round, round)
    padded: bool = False

    @property
    def needs_resized(self) -> bool:
        """Whether the coordinates depend on the processor's resize."""
        return self.full is None

    def format(self, box: Box, size: Size, resized: Size | None = None, label: str | None = None) -> str:
        """One box as text.

        Args:
            box: (x1, y1, x2, y2) in pixels of the original image; clipped to it.
            label: what stands there, for conventions that write it.
        """
        frame, left, top = self._frame(size)
        unit = 10**self.decimals
        steps = [edge * unit for edge in self._edges(resized)]
        clipped = clip(box, size)
        if clipped is None:
            raise UserError(
                f"The box {tuple(box)} is empty inside of an image of {size[0]}x{size[1]} pixels. Expected x1 < x2 "
                "and y1 < y2 in pixels."
            )
        x1, y1, x2, y2 = clipped
        scaled = scale((x1 + left, y1 + top, x2 + left, y2 + top), frame, steps)
        # padding begins where the image ends: a box that began there would hold nothing of it
        ends = scale((0, 0, left + size[0], top + size[1]), frame, steps)[2:]
        limits = [min(int(step), math.ceil(end)) for step, end in zip(steps, ends, strict=True)]
        numbers = whole(scaled, limits, self.rounding)
        return self.write([n / unit for n in numbers] if self.decimals else numbers, label)

    def parse(self, text: str, size: Size, resized: Size | None = None) -> list[Box]:
        """Every box in a text, in order, clipped to the image; what is malformed or empty is left out.

        Raises UserError: `resized` is missing where it is needed (never because of the text).
        """
        frame, left, top = self._frame(size)
        edges = self._edges(resized)
        boxes = []
        for groups in re.findall(self.pattern, text):
            if (numbers := self.read(groups)) is not None:
                x1, y1, x2, y2 = scale(numbers, edges, frame)
                boxes.append(clip((x1 - left, y1 - top, x2 - left, y2 - top), size))
        return [box for box in boxes if box is not None]

    def _edges(self, resized: Size | None) -> Size:
        if self.full is not None:
            return self.full, self.full
        if resized is None:
            raise UserError(
                f"The box convention {self.name} counts pixels of the resized image: pass `resized`, "
                "see vlm_sft_rl.models.boxes.resized_sizes."
            )
        return resized

    def _frame(self, size: Size) -> tuple[Size, float, float]:
        """The size of what the numbers refer to, and where the image begins in it."""
        if not self.padded:
            return size, 0.0, 0.0
        side = max(size)
        return (side, side), (side - size[0]) / 2, (side - size[1]) / 2


def clip(box: Iterable[float], size: Size) -> Box | None:
    """The part of a box inside of the image, None where there is none."""
    x1, y1, x2, y2 = box
    x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, size[0]), min(y2, size[1])
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def scale(box: Iterable[float], old: Size, new: Size) -> Box:
    x1, y1, x2, y2 = box
    (old_w, old_h), (new_w, new_h) = old, new
    return (x1 * new_w / old_w, y1 * new_h / old_h, x2 * new_w / old_w, y2 * new_h / old_h)


def whole(box: Box, limits: Sequence[int], rounding: Sequence[Callable[[float], int]]) -> list[int]:
    """Whole numbers with x1 < x2 and y1 < y2 inside of `limits`, however small the box is."""
    near, far = rounding
    low = [min(near(first), limit - 1) for first, limit in zip(box[:2], limits, strict=True)]
    ends = [min(far(last), limit) for last, limit in zip(box[2:], limits, strict=True)]
    return [*low, *(max(start + 1, end) for start, end in zip(low, ends, strict=True))]


# Numbers as they stand in a text. Those of more digits are noise, and Python refuses to read very long ones.
INTEGER = r"-?\d{1,6}"
DECIMAL = r"-?\d{0,6}(?:\.\d{1,12}|\d)"
CORNERS = rf"\(\s*({INTEGER})\s*,\s*({INTEGER})\s*\)\s*,\s*\(\s*({INTEGER})\s*,\s*({INTEGER})\s*\)"


def listed(number: str) -> str:
    """A pattern for four numbers in square brackets."""
    return r"\[\s*" + r"\s*,\s*".join([f"({number})"] * 4) + r"\s*\]"


def integers(groups: Sequence[str]) -> list[float]:
    return [float(number) for number in groups]


def fractions(groups: Sequence[str]) -> list[float] | None:
    numbers = [float(number) for number in groups]
    return numbers if max(numbers) <= 1 else None  # above 1: pixels or per mille, another convention


def in_tags(box: str, label: str) -> Callable[[Sequence[float], str | None], str]:
    """Writes `box`, with four `{}` for the numbers, behind `label`, with one, where there is one."""
    return lambda numbers, name: (label.format(name) if name else "") + box.format(*numbers)


def in_json(numbers: Sequence[int], label: str | None) -> str:
    """`{"bbox_2d": [x1, y1, x2, y2], "label": "…"}`, which is read in lists, in code fences and in lists cut short."""
    return json.dumps({"bbox_2d": list(numbers)} | ({"label": label} if label else {}), ensure_ascii=False)


# The pocket world names the cells of its grid: one (`w1`), or the first and the last of a block (`w1-x2`).
COLUMNS, ROWS = "wxyz", "1234"
CELL = f"([{COLUMNS}])([{ROWS}])"


def in_cells(numbers: Sequence[int], label: str | None) -> str:
    x1, y1, x2, y2 = numbers
    first, last = COLUMNS[x1] + ROWS[y1], COLUMNS[x2 - 1] + ROWS[y2 - 1]
    text = first if first == last else f"{first}-{last}"
    return f"{label} {text}" if label else text


def cells(groups: Sequence[str]) -> list[float]:
    x1, y1, x2, y2 = groups
    near, far = (COLUMNS.index(x1), ROWS.index(y1)), (COLUMNS.index(x2 or x1), ROWS.index(y2 or y1))
    return [*near, *(index + 1 for index in far)]


JSON = {"opening": '{"bbox_2d": [', "pattern": r'"bbox_2d"\s*:\s*' + listed(INTEGER), "write": in_json}
HUNDREDTHS = {
    "opening": "[",
    "pattern": listed(DECIMAL),
    "write": in_tags("[{:.2f}, {:.2f}, {:.2f}, {:.2f}]", "{} "),
    "read": fractions,
    "full": 1,
    "decimals": 2,
}
CONVENTIONS: dict[str, BoxConvention] = {
    convention.name: convention
    for convention in (
        BoxConvention(
            "qwen-vl", "<box>(", CORNERS, in_tags("<box>({},{}),({},{})</box>", "<ref>{}</ref>"), integers,
            full=999, rounding=(int, int),  # down, as Qwen-VL's and SC-Tune's data were written
        ),
        BoxConvention(
            "qwen2-vl", "<|box_start|>(", CORNERS,
            in_tags(
                "<|box_start|>({},{}),({},{})<|box_end|>", "<|object_ref_start|>{}<|object_ref_end|>"
            ), integers, full=1000,
        ),
        BoxConvention("qwen2.5-vl", **JSON, read=integers),
        BoxConvention("qwen3-vl", **JSON, read=integers, full=1000),
        BoxConvention(
            "internvl", "<box>[[", listed(INTEGER), in_tags("<box>[[{}, {}, {}, {}]]</box>", "<ref>{}</ref>"),
            integers, full=1000,
        ),
        BoxConvention("llava", **HUNDREDTHS),  # and Shikra's
        BoxConvention("llava-pad", **HUNDREDTHS, padded=True),
        # a box that ends on a line between two cells does not reach into the next
        BoxConvention(
            "pocket", "", rf"\b{CELL}(?:-{CELL})?\b", in_cells, cells, full=len(COLUMNS), rounding=(int, math.ceil)
        ),
    )
}  # fmt: skip
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
    """
    grids = features.get("image_grid_thw")
    if grids is None:
        raise UserError(
            f"{type(processor).__name__} returns no `image_grid_thw`: its resize cannot be told. Choose a box "
            "convention relative to the image."
        )
    patch = getattr(processor, "image_processor", processor).patch_size
    return [(int(width) * patch, int(height) * patch) for _, height, width in grids.tolist()]
