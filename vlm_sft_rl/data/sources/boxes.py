"""Detection sets and referring expressions -> region rows."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import RowError, UserError
from ..images import open_image
from ..rows import check_box, clip, from_xywh, wrong_field
from .source import Record, Source, arrays, objects

CROWD = "boxes of a crowd left out"
CLIPPED = "boxes clipped to the image"
EMPTY = "boxes without area left out"
_EXPRESSIONS = ("expressions", "sentences", "sents", "sent", "expression", "phrase", "answer", "caption")


class CocoImage(NamedTuple):
    """An entry of `images`; `caption` is that of MDETR's referring files, else empty."""

    name: str
    size: tuple[int, int]
    caption: str = ""


def coco(source: Source) -> Iterator[dict]:
    """COCO and Objects365: `{"images", "annotations": [{"image_id", "category_id", "bbox": xywh}], "categories"}`.

    MDETR's files of RefCOCO, RefCOCO+ and RefCOCOg have this layout with a `caption` for every image entry: it becomes
    the expression. A row whose category also has a crowd in its image says so: `crowds` counts their boxes. The file is
    read twice, first for images, categories and crowds; memory is that of these, not of the annotations.
    """
    images, categories, crowds = _read_tables(source, "images", "categories", "annotations")
    for number, (_, r) in enumerate(arrays(source, "annotations"), 1):
        image = _look_up(images, r, "image_id")
        if r.raw.get("iscrowd"):
            source.notes[CROWD] += 1
            continue
        more = {
            "category": _look_up(categories, r, "category_id"),
            "crowds": crowds[r.raw["image_id"], r.raw["category_id"]],
            "expressions": [image.caption] if image.caption else None,
        }
        box = from_xywh(r.take("bbox", list), r.where)
        yield from _region(source, r.raw.get("id", number), image.name, image.size, box, more)


def _read_tables(source: Source, *names: str) -> tuple[dict, dict, Counter]:
    """`({image id: CocoImage}, {category id: name}, {(image id, category id): crowds})`; crowds need `annotations`."""
    images, categories, crowds = {}, {}, Counter()
    for name, r in arrays(source, *names):
        if name == "annotations":
            if isinstance(r.raw, dict) and r.raw.get("iscrowd"):
                crowds[r.take("image_id", int, str), r.take("category_id", int, str)] += 1
        elif name == "categories":
            categories[r.take("id", int, str)] = r.text("name")
        else:
            width, height = r.take("width", int, float), r.take("height", int, float)
            if min(width, height) <= 0:
                raise r.wrong(f"image of {width} x {height} pixels.")
            caption = str(r.raw.get("caption") or "").strip()
            image = CocoImage(r.text("file_name"), (int(width), int(height)), caption)
            images[r.take("id", int, str)] = image
    return images, categories, crowds


def _look_up(table: dict, r: Record, field: str) -> Any:
    identity = r.take(field, int, str)
    if identity not in table:
        raise r.wrong(f"field `{field}`: there is no {identity!r} in the file. Is it complete?")
    return table[identity]


def refcoco(source: Source) -> Iterator[dict]:
    """The refs of RefCOCO, RefCOCO+ or RefCOCOg as JSON, with the boxes of `instances.json`; one row a ref.

    A ref is `{"ref_id", "ann_id", "image_id", "split", "sentences": [{"sent"}]}`. The published `refs(….p)` is a
    pickle, which is not read: a pickle runs code. Write it as JSON where you trust it.

    `source.split` leaves the refs of one split; None reads all.

    Raises UserError: no annotations file. RowError: a ref names an image or annotation that the file lacks.
    """
    if source.annotations is None:
        raise UserError("The format 'refcoco' needs the boxes too: --annotations instances.json.")
    instances = replace(source, path=Path(source.annotations))
    images, categories, _ = _read_tables(instances, "images", "categories")
    annotated = {r.take("ann_id", int, str) for r in objects(source)}
    annotations = (r.raw for _, r in arrays(instances, "annotations") if r.raw.get("id") in annotated)
    boxes = {raw["id"]: (raw.get("bbox"), raw.get("category_id")) for raw in annotations}
    for r in objects(source):
        split = r.raw.get("split")
        if source.split and split != source.split:
            continue
        image, (xywh, category) = _look_up(images, r, "image_id"), _look_up(boxes, r, "ann_id")
        more = {
            "expressions": _texts(r, "sentences"),
            "category": categories.get(category),
            "split": str(split) if split else None,
        }
        identity = r.raw.get("ref_id", r.raw["ann_id"])
        yield from _region(source, identity, image.name, image.size, from_xywh(xywh, r.where), more)


def sc_tune(source: Source) -> Iterator[dict]:
    """SC-Tune's released list: `image_id` (a file name) and `bbox` [x0, y0, x1, y1] as shares of the image.

    The list has no sizes, so every image is opened: below the folder of the source, else of the target.
    """
    sizes: dict[str, tuple[int, int]] = {}
    for r in objects(source):
        name = r.text("image_id")
        shares = check_box(r.raw.get("bbox"), r.where, "bbox", digits=None)
        if not all(0 <= share <= 1 for share in shares):
            raise wrong_field("bbox", "four shares from 0 to 1", shares, r.where)
        if name not in sizes:
            sizes[name] = _size(r, name)
        box = [share * side for share, side in zip(shares, sizes[name] * 2, strict=True)]
        yield from _region(source, f"{Path(name).stem}-{r.key}", name, sizes[name], check_box(box, r.where))


def rec(source: Source) -> Iterator[dict]:
    """One object a row: `image`, `bbox` or `box`, and its expressions under one of the usual names.

    Width and height are read from the image where the row lacks them.
    """
    for r in objects(source):
        yield from rec_rows(r)


def rec_rows(r: Record) -> Iterator[dict]:
    """The region row of one record, if its box has an area inside the image."""
    name = "box" if r.raw.get("box") is not None else "bbox"
    is_xywh = r.source.box_format == "xywh"
    box = from_xywh(r.raw.get(name), r.where) if is_xywh else check_box(r.raw.get(name), r.where, name)
    images = r.raw.get("images")
    image = images[0] if isinstance(images, list) and len(images) == 1 else r.text("image")
    size = _size(r, image)
    field = next((name for name in _EXPRESSIONS if r.raw.get(name)), None)
    more = {"expressions": _texts(r, field) if field else None}
    more |= {name: r.raw.get(name) for name in ("category", "split")}
    yield from _region(r.source, r.raw.get("id", r.raw.get("question_id", r.number)), image, size, box, more)


def _region(
    source: Source,
    identity: Any,
    image: str,
    size: tuple[int, int],
    box: list[float],
    more: dict[str, Any] | None = None,
) -> Iterator[dict]:
    """The row of a box, clipped to its image; none, but counted, where nothing of it is left. Empty fields are left out."""
    inside = clip(box, *size)
    if inside is None:
        source.notes[EMPTY] += 1
        return
    if inside != box:
        source.notes[CLIPPED] += 1
    row = {
        "id": str(identity),
        "image": source.image(image),
        "width": size[0],
        "height": size[1],
        "box": inside,
    }
    yield row | {name: value for name, value in (more or {}).items() if value}


def _texts(r: Record, field: str) -> list[str]:
    value = r.raw.get(field)
    items = value if isinstance(value, list) else [value]
    texts = [item.get("sent", item.get("raw")) if isinstance(item, dict) else item for item in items]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise wrong_field(field, "expressions", value, r.where)
    return [text.strip() for text in texts]


def _size(r: Record, image: str) -> tuple[int, int]:
    if r.raw.get("width") is not None and r.raw.get("height") is not None:
        return int(r.take("width", int, float)), int(r.take("height", int, float))
    name, base = r.source.image(image), r.source.images_base
    roots = [r.source.path.parent, *([base] if base else [])]
    root = next((root for root in roots if (root / name).is_file()), roots[0])
    try:
        return open_image(name, root).size
    except RowError as error:
        reason = f"no `width` and `height`, and its image cannot tell: {error.reason}"
        raise RowError(error.kind, reason, r.where) from error
