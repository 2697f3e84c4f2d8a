"""How a file writes its boxes: as pixels, and whether its boxes as a whole are of the convention it is read in."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..rows import SMALLEST_SIDE, check_box, clip

# [x0, y0, x1, y1] or [x, y, width, height] in pixels; [x0, y0, x1, y1] as shares, percents and thousandths of the image
SCALES = {"xyxy": None, "xywh": None, "norm1": 1, "norm100": 100, "norm1000": 1000}
BOX_FORMATS = tuple(SCALES)
CLIPPED = "boxes clipped to the image"
EMPTY = "boxes without area left out"
_BEYOND = 0.02  # of a side that boxes may leave the image by: annotators are not exact
_MISFITS = 0.05  # of the boxes, from which on another convention that explains them is believed
_MANY = 8  # boxes, from which on they should fill the frame they are said to have
_FILLED = 0.8  # of the image, to the right and down, that boxes of one's convention reach
_CHANCE = 0.01  # of all boxes lying inside a smaller frame than theirs, if they lay anywhere


class Boxes:
    """The boxes of a file, read in one convention; counts, over the file, tell whether another explains them better.

    Args:
        path: the file, for messages.
        name: the convention; None takes `usual`.
        usual: that of the format.
        notes: counts boxes clipped or left out.
    """

    def __init__(self, path: Path, name: str | None, notes: Counter, usual: str = "xyxy"):
        self.path, self.name, self.notes = path, name or usual, notes
        self.is_believed = name is not None and SCALES[name] is None
        self.sizes: dict = {}  # of the images that were looked at
        self.count = self.empty = self.misfits = 0
        self.first = ""  # box that does not fit
        self.fits: Counter = Counter()
        self.gained: Counter = Counter()  # boxes that fit another convention and not this one
        self.rescued: Counter = (
            Counter()
        )  # boxes that fit another and have nothing inside the image in this one
        self.lost: Counter = Counter()  # boxes that fit this one and not another
        self.surprise: Counter = Counter()  # -log of the chance that they lie in another's frame by accident
        self.reach = {name: [0.0] * 4 for name in SCALES}  # the largest x0, y0, x1, y1 as shares of the image

    def read(self, raw: Any, size: tuple[int, int], where: str) -> list[float] | None:
        """A box in pixels, clipped to its image; None, but counted, where nothing of it is left. Raises RowError."""
        numbers = check_box(raw, where, "bbox")
        self.count += 1
        box = [round(value, 2) for value in to_pixels(numbers, size, self.name)]
        inside = clip(box, *size)
        self._weigh(numbers, size, inside is None, where)
        if inside is None:
            self.empty += 1
            self.notes[EMPTY] += 1
        elif inside != box:
            self.notes[CLIPPED] += 1
        return inside

    def _weigh(self, numbers: list[float], size: tuple[int, int], is_empty: bool, where: str) -> None:
        fits = {name: _fits(numbers, size, name) for name in SCALES}
        is_fit = fits[self.name]
        if not is_fit:
            self.misfits += 1
            self.first = self.first or f"{where}: {numbers} in {size[0]} x {size[1]} pixels"
        for name, fits_other in fits.items():
            self.fits[name] += fits_other
            self.gained[name] += fits_other and not is_fit
            self.rescued[name] += fits_other and is_empty
            self.lost[name] += is_fit and not fits_other
            frame, mine = _frame(name, size), _frame(self.name, size)
            self.surprise[name] += sum(max(0.0, math.log(b / a)) for a, b in zip(frame, mine, strict=True))
            shares = [v / side for v, side in zip(to_pixels(numbers, size, name), size * 2, strict=True)]
            self.reach[name] = [max(pair) for pair in zip(self.reach[name], shares, strict=True)]

    def check(self) -> None:
        """Call it behind the last box. Raises UserError: another convention explains the boxes better, or most of them have
        nothing inside their image."""
        better = [name for name in SCALES if self._is_better(name)]
        if better:
            other = max(better, key=lambda name: (self.fits[name], self._filled(name)))
            raise UserError(
                f"{self.path}: {self.misfits} of {self.count} boxes do not fit into their images as {self.name} (the first: "
                f"{self.first}), and {self.fits[other]} fit as {other}. Convert with --box-format {other}."
            )
        if 2 * self.empty > self.count:
            raise UserError(
                f"{self.path}: {self.empty} of {self.count} boxes have nothing inside their images as {self.name} (the "
                f"first: {self.first}). Choose the convention with --box-format {', '.join(SCALES)}, or correct the sizes."
            )
        smaller = next((name for name in SCALES if self._lies_within(name)), None)
        if smaller and self.is_believed:
            self.notes[f"boxes that --box-format {smaller} would explain as well"] = self.count
        elif smaller:
            other = "" if SCALES[self.name] else f", or with --box-format {self.name} if they are pixels"
            raise UserError(
                f"{self.path}: all {self.count} boxes lie within the frame of {smaller} and fill it, so they do not look "
                f"like {self.name}. Convert with --box-format {smaller}{other}."
            )

    def _is_better(self, name: str) -> bool:
        gained = self.gained[name]
        if gained <= self.lost[name] or gained < _MISFITS * self.count or self.fits[name] < 0.8 * self.count:
            return False
        if SCALES[name] in (None, 1) or 10 * self.rescued[name] >= self.count:
            return True
        # the frame of thousandths holds any box of a small image, also one that leaves it in part
        return self.count >= _MANY and self._filled(name) > _FILLED and self.fits[name] >= 0.98 * self.count

    def _lies_within(self, name: str) -> bool:
        if name in (self.name, "xywh") or self.count < _MANY or self.fits[name] < self.count:
            return False
        is_spread = min(self.reach[name][:2]) > 0.5 and self._filled(name) > _FILLED
        return is_spread and self.surprise[name] > -math.log(_CHANCE)

    def _filled(self, name: str) -> float:
        """How far the boxes reach to the right and down, as a share of the image."""
        return min(self.reach[name][2:])


def to_pixels(numbers: Sequence[float], size: tuple[int, int], name: str) -> list[float]:
    """A box of that convention as `[x0, y0, x1, y1]` in pixels."""
    x0, y0, x1, y1 = numbers
    if name == "xywh":
        return [x0, y0, x0 + x1, y0 + y1]
    if SCALES[name] is None:
        return list(numbers)
    return [
        value * side / scale
        for value, side, scale in zip(numbers, size * 2, _frame(name, size) * 2, strict=True)
    ]


def _frame(name: str, size: tuple[int, int]) -> tuple[float, float]:
    """The numbers that stand for the right and the lower edge of an image."""
    scale = SCALES[name]
    return size if scale is None else (scale, scale)


def _fits(numbers: list[float], size: tuple[int, int], name: str) -> bool:
    """Whether the box lies in its image, nearly at least, and has an area of pixels."""
    if max(numbers) <= 1 and name != "norm1":
        return False  # a box within the first pixel
    box = to_pixels(numbers, size, name)
    sides = zip(box[:2], box[2:], size, strict=True)
    return all(
        a >= -_BEYOND * side and b <= (1 + _BEYOND) * side and b - a >= SMALLEST_SIDE - 0.005
        for a, b, side in sides
    )
