"""How a file writes its boxes: as pixels, and whether its boxes as a whole are of the convention it is read in."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from ..rows import SMALLEST_SIDE, below_a_pixel, check_box, clip

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
_BATCH = 4096  # boxes that are weighed at once: one by one that takes longer than to read them


@dataclass(slots=True)
class _Reading:
    """What the boxes of a file would be in one convention; (x0, y0, x1, y1) are the largest, as shares of the image."""

    fits: int = 0
    gained: int = 0  # boxes that fit it, and not the convention that the file is read in
    rescued: int = 0  # boxes that fit it, and have nothing inside the image in the other
    lost: int = 0  # boxes that do not fit it, but the other
    surprise: float = 0.0  # -log of the chance that they lie inside its frame by accident
    reach: Any = 0.0  # four numbers, when there is a box

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
        self.count = self.empty = self.outside = self.misfits = 0
        self.first = ""  # box that does not fit
        self.readings = {name: _Reading() for name in SCALES}
        self.batch: list[tuple] = []

    def read(self, raw: Any, size: tuple[int, int], where: str) -> list[float] | None:
        """A box in pixels, clipped to its image; None, but counted, where nothing of it is left. Raises RowError."""
        numbers = check_box(raw, where, "bbox")
        self.count += 1
        (width, height), (x0, y0, x1, y1) = size, numbers
        if self.name == "xywh":
            x1, y1 = x0 + x1, y0 + y1
        across, down = size if (scale := SCALES[self.name]) is None else (scale, scale)
        box = [
            round(x0 / across * width, 2),
            round(y0 / down * height, 2),
            round(x1 / across * width, 2),
            round(y1 / down * height, 2),
        ]
        inside = clip(box, width, height)
        self.batch.append((*numbers, width, height, inside is None, where))
        if len(self.batch) == _BATCH:
            self._weigh()
        if inside is None:
            self.empty += 1
            self.outside += not below_a_pixel(box)
            self.notes[EMPTY] += 1
        elif inside != box:
            self.notes[CLIPPED] += 1
        return inside

    def _weigh(self) -> None:
        """Count what the boxes of the batch are in each convention."""
        places, table = [row[-1] for row in self.batch], np.array([row[:-1] for row in self.batch], float)
        self.batch.clear()
        numbers, sizes, is_empty = table[:, :4], table[:, 4:6], table[:, 6] > 0
        shares = {name: _shares(numbers, sizes, name) for name in SCALES}
        # numbers of at most 1 would be a box within the first pixel
        are_pixels = numbers.max(axis=1) > 1
        fits = {
            name: _fits(shares[name], sizes) & (are_pixels if name != "norm1" else True) for name in SCALES
        }
        is_fit = fits[self.name]
        self.misfits += int((~is_fit).sum())
        if not self.first and not is_fit.all():
            at = int(is_fit.argmin())
            width, height = map(int, sizes[at])
            self.first = f"{places[at]}: {numbers[at].tolist()} in {width} x {height} pixels"
        for name, reading in self.readings.items():
            reading.fits += int(fits[name].sum())
            reading.gained += int((fits[name] & ~is_fit).sum())
            reading.rescued += int((fits[name] & is_empty).sum())
            reading.lost += int((is_fit & ~fits[name]).sum())
            reading.reach = np.maximum(reading.reach, shares[name].max(axis=0))
            larger = _frame(self.name, sizes) / _frame(name, sizes)
            reading.surprise += float(np.log(np.maximum(larger, 1)).sum())

    def check(self) -> None:
        """Call it behind the last box. Raises UserError: another convention explains the boxes better, or most of them leave
        their images."""
        if self.batch:
            self._weigh()
        better = [name for name in SCALES if self._is_better(self.readings[name], SCALES[name])]
        if better:
            other = max(better, key=lambda name: (self.readings[name].fits, self.readings[name].filled))
            raise UserError(
                f"{self.path}: {self.misfits} of {self.count} boxes do not fit into their images as {self.name} (the first: "
                f"{self.first}), and {self.readings[other].fits} fit as {other}. Convert with --box-format {other}."
            )
        # boxes of objects that go on behind the edge leave their images too, but none of them lies outside
        are_elsewhere = 2 * self.misfits > self.count and self.outside > _BEYOND * self.count
        if 2 * self.empty > self.count or are_elsewhere:
            raise UserError(
                f"{self.path}: {self.empty} of {self.count} boxes have nothing inside their images as {self.name}, and "
                f"{self.misfits} do not fit (the first: {self.first}). Choose the convention with --box-format "
                f"{', '.join(SCALES)}; scale boxes of resized images, and make corners of those given by their centre."
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


def _shares(numbers: np.ndarray, sizes: np.ndarray, name: str) -> np.ndarray:
    """The corners of boxes of that convention as shares of their images."""
    corners = numbers.copy()
    if name == "xywh":
        corners[:, 2:] += corners[:, :2]
    return corners / np.tile(_frame(name, sizes), 2)


def _frame(name: str, sizes: np.ndarray) -> np.ndarray:
    """The numbers that stand for the right and the lower edges of images."""
    scale = SCALES[name]
    return sizes if scale is None else np.full_like(sizes, scale)


def _fits(shares: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Whether each box lies in its image, nearly at least, and has an area of pixels."""
    is_inside = (shares[:, :2].min(axis=1) >= -_BEYOND) & (shares[:, 2:].max(axis=1) <= 1 + _BEYOND)
    sides = (shares[:, 2:] - shares[:, :2]) * sizes
    return is_inside & (sides.min(axis=1) >= SMALLEST_SIDE - 0.005)
