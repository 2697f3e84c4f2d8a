"""Region rows: boxes on images, for describing and locating.

    {"id": str, "image": path, "width": int, "height": int, "box": [x1, y1, x2, y2], "expression"?: str, "label"?: str}

`box` is in pixels of the image. SC-Tune needs nothing else; `expression` is what a person called the region (for
supervised rows and evaluation), `label` its class. No torch here.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import read_jsonl
from .images import open_image
from .problems import FORMAT, RowError

FIELDS = ("id", "image", "width", "height", "box")


def read_regions(path: str | Path) -> list[dict]:
    """The region rows of a JSONL file.

    Raises:
        RowError: a field is missing or of the wrong kind, a box is empty or leaves its image; the row is named.
        UserError: the file cannot be read or has no rows.
    """
    rows = [check_region(row, f"{path}:{number}") for number, row in read_jsonl(path)]
    if not rows:
        raise UserError(f"{path}: no region rows. Write them with `vlm-sft-rl regions convert`.")
    return rows


def check_region(row: dict, where: str = "") -> dict:
    """The row with its box as floats, checked. Raises RowError."""
    where = where or str(row.get("id", ""))
    if missing := [field for field in FIELDS if row.get(field) is None]:
        raise RowError(
            FORMAT,
            f"a region row needs the fields {', '.join(FIELDS)}; {', '.join(missing)} missing. Convert the source file "
            "with `vlm-sft-rl regions convert`.",
            where,
        )
    box, width, height = row["box"], row["width"], row["height"]
    numbers = [width, height, *box] if isinstance(box, list | tuple) else []
    if len(numbers) != 6 or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in numbers):
        raise RowError(FORMAT, f"field `box`: expected four numbers of pixels, found {box!r:.80}.", where)
    x1, y1, x2, y2 = box
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        raise RowError(
            FORMAT,
            f"field `box`: {list(box)} is not inside of the image of {width}x{height} pixels with x1 < x2 and y1 < y2. "
            "Boxes are corners (x1, y1, x2, y2), not a corner and a size.",
            where,
        )
    return {**row, "id": str(row["id"]), "box": [float(v) for v in box]}


@dataclass(frozen=True)
class RegionFilter:
    """Which regions are worth describing; every limit None or 0 is off.

    Attributes:
        min_side: shortest side in pixels: the IoU of tiny boxes is noise.
        min_area, max_area: share of the image's area.
        max_same_label: at most so many regions of one label in an image; 1 keeps labels that are unique in it.
        max_per_image: regions kept of one image, the largest first.
    """

    min_side: float = 0
    min_area: float = 0.0
    max_area: float = 1.0
    max_same_label: int | None = None
    max_per_image: int | None = None

    def __post_init__(self):
        if not 0 <= self.min_area <= self.max_area <= 1:
            raise UserError(
                f"region filter: expected 0 <= min_area <= max_area <= 1, found {self.min_area} and {self.max_area}."
            )
        for name in ("max_same_label", "max_per_image"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"region filter: {name} = {getattr(self, name)}, expected at least 1.")

    def apply(self, regions: Iterable[dict], notes: Counter) -> Iterator[dict]:
        """Yield the regions kept, image by image; `notes` counts the others by reason.

        Uniqueness is judged before the size limits: a small twin makes a description ambiguous too. Regions of one
        image must stand together.
        """
        for group in _by_image(regions):
            labels = Counter(row.get("label") for row in group)
            kept = []
            for row in group:
                reason = self._reason(row, labels)
                if reason is None:
                    kept.append(row)
                else:
                    notes[reason] += 1
            if self.max_per_image is not None and len(kept) > self.max_per_image:
                largest = sorted(kept, key=_area, reverse=True)[: self.max_per_image]
                chosen = {id(row) for row in largest}
                notes["more regions than max_per_image"] += len(kept) - len(chosen)
                kept = [row for row in kept if id(row) in chosen]
            yield from kept

    def _reason(self, row: dict, labels: Counter) -> str | None:
        x1, y1, x2, y2 = row["box"]
        share = _area(row) / (row["width"] * row["height"])
        if min(x2 - x1, y2 - y1) < self.min_side:
            return "side shorter than min_side"
        if share < self.min_area:
            return "smaller than min_area"
        if share > self.max_area:
            return "larger than max_area"
        if self.max_same_label is not None:
            if row.get("label") is None:
                raise RowError(FORMAT, "max_same_label needs the field `label`.", str(row["id"]))
            if labels[row["label"]] > self.max_same_label:
                return "label not unique"
        return None


class RegionCollator:
    """Rows -> the same rows with their images open, in the data loader's workers.

    The text is rendered later: it depends on the phase, and on descriptions that do not exist yet.

    Raises:
        RowError: an image is missing or unreadable, or is not of the size the row says.
    """

    def __init__(self, image_root: str | Path | None = None):
        self.image_root = image_root

    def __call__(self, rows: Sequence[dict]) -> dict[str, Any]:
        return {"rows": [self._open(row) for row in rows]}

    def _open(self, raw: dict) -> dict:
        row = check_region(raw)
        try:
            picture = open_image(row["image"], self.image_root)
        except RowError as error:
            raise error.at(row["id"]) from error
        if picture.size != (row["width"], row["height"]):
            raise RowError(
                FORMAT,
                f"image {row['image']!r:.80} is {picture.width}x{picture.height}, the row says {row['width']}x"
                f"{row['height']}: its box would be in the wrong place. Correct `width` and `height`, or the picture "
                "(they are of the picture after its EXIF rotation).",
                row["id"],
            )
        return {**row, "picture": picture}


def _area(row: dict) -> float:
    x1, y1, x2, y2 = row["box"]
    return (x2 - x1) * (y2 - y1)


def _by_image(regions: Iterable[dict]) -> Iterator[list[dict]]:
    group: list[dict] = []
    for row in regions:
        if group and group[0]["image"] != row["image"]:
            yield group
            group = []
        group.append(row)
    if group:
        yield group
