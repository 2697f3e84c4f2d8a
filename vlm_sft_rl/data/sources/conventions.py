"""How a file writes its boxes: as pixels, and whether its boxes as a whole are of the convention it is read in."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
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
_SURPRISE = math.log(100)  # 1 : 100 that boxes lie inside a smaller frame than theirs by accident


@dataclass(slots=True)
class _Reading:
    """What the boxes of a file would be in one convention; (x0, y0, x1, y1) are the largest, as shares of the image."""

    fits: int = 0
    gained: int = 0  # boxes that fit it, and not the convention that the file is read in
    rescued: int = 0  # boxes that fit it, and have nothing inside the image in the other
    lost: int = 0  # boxes that do not fit it, but the other
    surprise: float = 0.0  # -log of the chance that they lie inside its frame by accident
    reach: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)

    @property
    def filled(self) -> float:
        """How far the boxes reach to the right and down."""
        return min(self.reach[2:])


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
        self.readings = {name: _Reading() for name in SCALES}

    def read(self, raw: Any, size: tuple[int, int], where: str) -> list[float] | None:
        """A box in pixels, clipped to its image; None, but counted, where nothing of it is left. Raises RowError."""
        numbers = check_box(raw, where, "bbox")
        self.count += 1
        (width, height), (x0, y0, x1, y1) = size, _shares(numbers, size, self.name)
        box = [round(v, 2) for v in (x0 * width, y0 * height, x1 * width, y1 * height)]
        inside = clip(box, *size)
        self._weigh(numbers, size, inside is None, where)
        if inside is None:
            self.empty += 1
            self.notes[EMPTY] += 1
        elif inside != box:
            self.notes[CLIPPED] += 1
        return inside

    def _weigh(self, numbers: list[float], size: tuple[int, int], is_empty: bool, where: str) -> None:
        shares = {name: _shares(numbers, size, name) for name in SCALES}
        # in pixels that would be a box within the first one
        within = ("norm1",) if max(numbers) <= 1 else SCALES
        fits = {name: name in within and _fits(shares[name], size) for name in SCALES}
        is_fit = fits[self.name]
        if not is_fit:
            self.misfits += 1
            self.first = self.first or f"{where}: {numbers} in {size[0]} x {size[1]} pixels"
        for name, reading in self.readings.items():
            reading.fits += fits[name]
            reading.gained += fits[name] and not is_fit
            reading.rescued += fits[name] and is_empty
            reading.lost += is_fit and not fits[name]
            reading.reach = tuple(map(max, reading.reach, shares[name]))
            if reading.surprise <= _SURPRISE:
                sides = zip(_frame(name, size), _frame(self.name, size), strict=True)
                reading.surprise += sum(math.log(mine / other) for other, mine in sides if other < mine)

    def check(self) -> None:
        """Call it behind the last box. Raises UserError: another convention explains the boxes better, or most of them have
        nothing inside their image."""
        better = [name for name in SCALES if self._is_better(self.readings[name], SCALES[name])]
        if better:
            other = max(better, key=lambda name: (self.readings[name].fits, self.readings[name].filled))
            raise UserError(
                f"{self.path}: {self.misfits} of {self.count} boxes do not fit into their images as {self.name} (the first: "
                f"{self.first}), and {self.readings[other].fits} fit as {other}. Convert with --box-format {other}."
            )
        if 2 * self.empty > self.count:
            raise UserError(
                f"{self.path}: {self.empty} of {self.count} boxes have nothing inside their images as {self.name} (the "
                f"first: {self.first}). Choose the convention with --box-format {', '.join(SCALES)}, or correct the sizes."
            )
        for name, reading in self.readings.items():
            if name == self.name or self.count < _MANY or reading.fits < self.count:
                continue
            is_smaller = reading.surprise > _SURPRISE and name != "xywh"
            is_spread = min(reading.reach[:2]) > 0.25 and max(reading.reach[:2]) > 0.5
            looks_smaller = is_smaller and is_spread and reading.filled > _FILLED
            if looks_smaller and not self.is_believed:
                other = "" if SCALES[self.name] else f", or with --box-format {self.name} if they are pixels"
                raise UserError(
                    f"{self.path}: all {self.count} boxes lie within the frame of {name} and fill it, so they do not look "
                    f"like {self.name}. Convert with --box-format {name}{other}."
                )
            # without another corner than the first, both conventions of pixels are one
            are_pixels = SCALES[name] is SCALES[self.name] is None and max(reading.reach[:2]) > 0.01
            if (looks_smaller or are_pixels) and self.misfits == 0:
                self.notes[f"boxes that --box-format {name} would explain as well"] = self.count

    def _is_better(self, reading: _Reading, scale: int | None) -> bool:
        if reading.gained <= reading.lost or reading.gained < _MISFITS * self.count:
            return False
        if scale in (None, 1) or 10 * reading.rescued >= self.count:
            return reading.fits >= 0.8 * self.count
        # the frame of thousandths holds any box of a small image, also one that leaves it in part
        return self.count >= _MANY and reading.filled > _FILLED and reading.fits >= 0.98 * self.count


def _shares(numbers: Sequence[float], size: tuple[int, int], name: str) -> tuple[float, float, float, float]:
    """The corners of a box of that convention as shares of the image."""
    x0, y0, x1, y1 = numbers
    width, height = _frame(name, size)
    if name == "xywh":
        x1, y1 = x0 + x1, y0 + y1
    return x0 / width, y0 / height, x1 / width, y1 / height


def _frame(name: str, size: tuple[int, int]) -> tuple[float, float]:
    """The numbers that stand for the right and the lower edge of an image."""
    scale = SCALES[name]
    return size if scale is None else (scale, scale)


def _fits(shares: tuple[float, float, float, float], size: tuple[int, int]) -> bool:
    """Whether the box lies in its image, nearly at least, and has an area of pixels."""
    x0, y0, x1, y1 = shares
    is_inside = min(x0, y0) >= -_BEYOND and max(x1, y1) <= 1 + _BEYOND
    return is_inside and min((x1 - x0) * size[0], (y1 - y0) * size[1]) >= SMALLEST_SIDE - 0.005
