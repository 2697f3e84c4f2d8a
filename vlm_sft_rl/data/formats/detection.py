"""Detection JSON -> region rows with `category`."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from ..box_fields import clip, from_xywh
from ..json_stream import stream_json_arrays
from ..problems import FORMAT, RowError
from .source import Source, take, take_text

CROWD = "boxes of a crowd left out"
CLIPPED = "boxes clipped to the image"
EMPTY = "boxes without area left out"


class Image(NamedTuple):
    """An entry of `images`; `caption` is that of MDETR's referring files, else empty."""

    name: str
    width: int
    height: int
    caption: str = ""


def coco(source: Source) -> Iterator[dict]:
    """COCO and Objects365: `{"images", "annotations": [{"image_id", "category_id", "bbox": xywh}], "categories"}`.

    MDETR's files of RefCOCO, RefCOCO+ and RefCOCOg have this layout with a `caption` for every image entry: it becomes
    the expression. A row whose category also has a crowd in its image says so: `crowds` counts their boxes. The file is
    read twice, first for images, categories and crowds; memory is that of these, not of the annotations.
    """
    images, categories, crowds = _read_tables(source.path, {"images", "categories", "annotations"})
    for _, number, raw in stream_json_arrays(source.path, {"annotations"}):
        where = f"{source.path}:annotations[{number}]"
        image = look_up(images, take(raw, "image_id", (int, str), where), "image_id", where)
        if raw.get("iscrowd"):
            source.notes[CROWD] += 1
            continue
        category = look_up(categories, take(raw, "category_id", (int, str), where), "category_id", where)
        box = region_box(source, take(raw, "bbox", list, where), image, where)
        if box is None:
            continue
        row = {
            "id": str(raw.get("id", number)),
            "image": source.image(image.name),
            "width": image.width,
            "height": image.height,
            "box": box,
            "category": category,
        }
        if count := crowds[raw["image_id"], raw["category_id"]]:
            row["crowds"] = count
        yield row | ({"expressions": [image.caption]} if image.caption else {})


def read_images(source: Source, path=None) -> tuple[dict, dict]:
    """`({image id: Image}, {category id: name})` of a COCO file."""
    images, categories, _ = _read_tables(path or source.path, {"images", "categories"})
    return images, categories


def _read_tables(path, keys: set[str]) -> tuple[dict, dict, Counter]:
    """As `read_images`, and the crowds of each (image id, category id) where `keys` has `annotations`."""
    images, categories, crowds = {}, {}, Counter()
    for key, number, raw in stream_json_arrays(path, keys):
        where = f"{path}:{key}[{number}]"
        if key == "annotations":
            if isinstance(raw, dict) and raw.get("iscrowd"):
                crowds[
                    tuple(take(raw, f"{name}_id", (int, str), where) for name in ("image", "category"))
                ] += 1
            continue
        identity = take(raw, "id", (int, str), where)
        if key == "images":
            size = (take(raw, "width", (int, float), where), take(raw, "height", (int, float), where))
            if min(size) <= 0:
                raise RowError(FORMAT, f"image of {size[0]} x {size[1]} pixels.", where)
            caption = str(raw.get("caption") or "").strip()
            images[identity] = Image(take_text(raw, "file_name", where), int(size[0]), int(size[1]), caption)
        else:
            categories[identity] = take_text(raw, "name", where)
    return images, categories, crowds


def look_up(table: dict, identity, field: str, where: str):
    if identity not in table:
        raise RowError(
            FORMAT, f"field `{field}`: there is no {identity!r} in the file. Is it complete?", where
        )
    return table[identity]


def region_box(source: Source, xywh: list, image: Image, where: str) -> list[float] | None:
    """The box as xyxy pixels inside the image; None, and counted, when nothing of it is left."""
    box = from_xywh(xywh, where)
    inside = clip(box, image.width, image.height)
    if inside is None:
        source.notes[EMPTY] += 1
    elif inside != box:
        source.notes[CLIPPED] += 1
    return inside
