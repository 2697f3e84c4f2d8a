"""Published box files -> region rows: COCO and Objects365, RefCOCO/+/g, SC-Tune's own list."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import UserError
from ..files import read_json, write_jsonl
from .images import open_image
from .problems import FORMAT, RowError
from .regions import RegionFilter, check_region
from .rows import read_raw

CROWD, BROKEN_BOX, OUTSIDE = "crowd annotation", "box without area", "box clipped to the image"


def convert_regions(
    source: str | Path,
    target: str | Path,
    source_format: str,
    *,
    image_root: str | Path | None = None,
    keep: RegionFilter | None = None,
) -> Counter:
    """Write the region rows of a source file to `target`; returns counts by what happened.

    Args:
        source_format: see `READERS`.
        image_root: where the images are; only `sc-tune` opens them, for their sizes.
        keep: which regions to keep; None keeps all.

    Raises:
        UserError: an unknown format, or a file that is not of it; the place is named.
    """
    if source_format not in READERS:
        raise UserError(f"format {source_format!r} is unknown. Choose one of {', '.join(READERS)}.")
    notes: Counter = Counter()
    rows = READERS[source_format](Path(source), image_root, notes)
    kept = list((keep or RegionFilter()).apply(rows, notes))
    if not kept:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in notes.items()) or "the file has none"
        raise UserError(f"{source}: no region is left ({reasons}). Loosen the filters.")
    write_jsonl(target, kept)
    notes["kept"] = len(kept)
    return notes


def read_coco(source: Path, image_root, notes: Counter) -> Iterator[dict]:
    """COCO instances and Objects365: `images`, `annotations` with `bbox` [x, y, width, height], `categories`.

    MDETR's RefCOCO files have the same layout with a `caption` for every image entry: it becomes the expression.
    """
    raw = read_json(source)
    if not isinstance(raw, dict) or not {"images", "annotations"} <= set(raw):
        raise UserError(f"{source}: expected a COCO file with `images` and `annotations`.")
    labels = {category["id"]: category["name"] for category in raw.get("categories", [])}
    own: dict = {}
    for entry in raw["annotations"]:
        own.setdefault(entry.get("image_id"), []).append(entry)
    for image in raw["images"]:
        for number, entry in enumerate(own.get(image.get("id"), ())):
            if entry.get("iscrowd"):
                notes[CROWD] += 1
                continue
            where = f"{source}: annotation {entry.get('id', number)} of image {image.get('id')}"
            try:
                x, y, width, height = entry["bbox"]
                row = {
                    "id": str(entry.get("id", f"{image['id']}-{number}")),
                    "image": image["file_name"],
                    "width": image["width"],
                    "height": image["height"],
                    "box": [x, y, x + width, y + height],
                }
            except (KeyError, TypeError, ValueError) as error:
                raise RowError(FORMAT, f"not a COCO annotation ({error!r}).", where) from error
            label = labels.get(entry.get("category_id"))
            row |= {"label": label} if label else {}
            row |= {"expression": image["caption"]} if image.get("caption") else {}
            if (row := _inside(row, where, notes)) is not None:
                yield row


def read_refcoco(source: Path, image_root, notes: Counter) -> Iterator[dict]:
    """One expression a line: `image`, `sent` (or `expression`), `bbox` [x1, y1, x2, y2], `width`, `height`.

    The layout of Qwen-VL's evaluation files for RefCOCO, RefCOCO+ and RefCOCOg. The original releases are pickles, which
    are not opened.
    """
    for number, raw in read_raw(source):
        where = f"{source}:{number}"
        try:
            row = {
                "id": str(raw.get("id", f"{source.stem}-{number}")),
                "image": raw["image"],
                "width": raw["width"],
                "height": raw["height"],
                "box": list(raw["bbox"]),
                "expression": raw["sent"] if "sent" in raw else raw["expression"],
            }
        except (KeyError, TypeError) as error:
            raise RowError(
                FORMAT, f"expected image, sent, bbox, width and height; {error} is missing.", where
            ) from error
        if (row := _inside(row, where, notes)) is not None:
            yield row


def read_sc_tune(source: Path, image_root, notes: Counter) -> Iterator[dict]:
    """SC-Tune's released list: `image_id` (a file name) and `bbox` [x1, y1, x2, y2] as shares of the image."""
    sizes: dict[str, tuple[int, int]] = {}
    for number, raw in read_raw(source):
        where = f"{source}:{number}"
        try:
            name, shares = raw["image_id"], [float(v) for v in raw["bbox"]]
        except (KeyError, TypeError, ValueError) as error:
            raise RowError(FORMAT, f"expected image_id and bbox ({error!r}).", where) from error
        if len(shares) != 4 or max(shares) > 1:
            raise RowError(FORMAT, f"field `bbox`: expected four shares from 0 to 1, found {shares}.", where)
        if name not in sizes:
            try:
                sizes[name] = open_image(name, image_root).size
            except RowError as error:
                raise error.at(where) from error
        width, height = sizes[name]
        box = [v * side for v, side in zip(shares, (width, height) * 2, strict=True)]
        row = {
            "id": f"{Path(name).stem}-{number}",
            "image": name,
            "width": width,
            "height": height,
            "box": box,
        }
        if (row := _inside(row, where, notes)) is not None:
            yield row


READERS: dict[str, Callable[..., Iterator[dict]]] = {
    "coco": read_coco,
    "objects365": read_coco,
    "refcoco": read_refcoco,
    "sc-tune": read_sc_tune,
}


def _inside(row: dict, where: str, notes: Counter) -> dict | None:
    """The row with its box clipped to the image (annotations overlap edges by fractions); None without area."""
    x1, y1, x2, y2 = row["box"]
    box = [max(x1, 0), max(y1, 0), min(x2, row["width"]), min(y2, row["height"])]
    if not (box[0] < box[2] and box[1] < box[3]):
        notes[BROKEN_BOX] += 1
        return None
    if box != row["box"]:
        notes[OUTSIDE] += 1
    return check_region({**row, "box": box}, where)
