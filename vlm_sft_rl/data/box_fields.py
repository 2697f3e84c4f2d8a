"""Boxes of region rows: xyxy pixels, origin at the top left, right and bottom edges exclusive."""

import math
from collections.abc import Sequence

from .problems import FORMAT, RowError

SMALLEST_SIDE = 1.0  # pixels; less is a mistake of annotation


def check_box(box: object, where: str, field: str = "box", digits: int | None = 2) -> list[float]:
    """Four finite numbers, rounded to `digits` (None: as they are). Raises RowError."""
    if (
        not isinstance(box, Sequence)
        or len(box) != 4
        or not all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in box)
    ):
        raise RowError(FORMAT, f"field `{field}`: expected four numbers, found {box!r:.80}.", where)
    return [float(v) if digits is None else round(float(v), digits) for v in box]


def from_xywh(box: object, where: str) -> list[float]:
    """`[x, y, width, height]` -> `[x0, y0, x1, y1]`. Raises RowError."""
    x, y, width, height = check_box(box, where, "bbox")
    return [x, y, round(x + width, 2), round(y + height, 2)]


def clip(box: Sequence[float], width: float, height: float) -> list[float] | None:
    """The part of a box inside the image, or None where a side of it is shorter than a pixel."""
    x0, y0, x1, y1 = box
    inside = [max(0.0, x0), max(0.0, y0), min(float(width), x1), min(float(height), y1)]
    return None if below_a_pixel(inside) else inside


def below_a_pixel(box: Sequence[float]) -> bool:
    """Whether a side of the box is shorter than a pixel; sides are taken to two decimals, as boxes are."""
    return round(min(box[2] - box[0], box[3] - box[1]), 2) < SMALLEST_SIDE
