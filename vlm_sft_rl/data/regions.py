"""Region rows: boxes on images, for describing and locating.

    {"id": str, "image": path, "width": int, "height": int, "box": [x0, y0, x1, y1], "category"?: str, "expressions"?: [str],
     "crowds"?: int}

`box` is in pixels of the upright image. SC-Tune needs nothing else; `expressions` are what people called the region (for
supervised rows and evaluation), `category` is its class, `crowds` how many boxes of a crowd of this class its image has
beside the rows. No torch here.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import read_jsonl
from .box_fields import below_a_pixel, check_box
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
        raise UserError(f"{path}: no region rows. Write them with `vlm-sft-rl data convert`.")
    return rows


def check_region(row: dict, where: str = "", size: tuple[int, int] | None = None) -> dict:
    """The row with its id as text and its box as floats.

    Args:
        size: width and height of the upright image, where it was opened.

    Raises:
        RowError: a field is missing or of the wrong kind, the box is empty or leaves the image, or `size` is another.
    """
    where = where or str(row.get("id", ""))
    if missing := [field for field in FIELDS if row.get(field) is None]:
        raise RowError(
            FORMAT,
            f"a region row needs the fields {', '.join(FIELDS)}; {', '.join(missing)} missing. Convert the source file "
            "with `vlm-sft-rl data convert`.",
            where,
        )
    check_box(row["box"], where)
    width, height = (_side(row, name, where) for name in ("width", "height"))
    if size is not None and (width, height) != size:
        raise RowError(
            FORMAT,
            f"fields `width`, `height`: {width} x {height}, but the image has {size[0]} x {size[1]} pixels. Boxes are in "
            "pixels of the upright image: scale them to it.",
            where,
        )
    x0, y0, x1, y1 = row["box"]
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise RowError(
            FORMAT,
            f"field `box`: {list(row['box'])} is no [x0, y0, x1, y1] inside an image of {width} x {height} pixels. Convert "
            "with --box-format xywh if these are x, y, width and height.",
            where,
        )
    if below_a_pixel(row["box"]):
        shares = (
            " They look like shares of the image: multiply them by its width and height."
            if x1 <= 1 >= y1
            else ""
        )
        raise RowError(
            FORMAT,
            f"field `box`: {list(row['box'])} is less than a pixel wide or high; boxes are in pixels.{shares}",
            where,
        )
    expressions = row.get("expressions")
    if expressions is not None and (
        not isinstance(expressions, list)
        or not expressions
        or not all(isinstance(text, str) and text.strip() for text in expressions)
    ):
        raise RowError(FORMAT, f"field `expressions`: expected texts, found {expressions!r:.80}.", where)
    return {**row, "id": str(row["id"]), "box": [float(v) for v in row["box"]]}


def _side(row: dict, name: str, where: str) -> int | float:
    value = row[name]
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise RowError(FORMAT, f"field `{name}`: expected a number of pixels, found {value!r:.80}.", where)
    return value


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
        return {**check_region(row, size=picture.size), "picture": picture}
