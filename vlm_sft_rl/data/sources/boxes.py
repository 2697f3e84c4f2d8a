"""Detection sets and referring expressions -> region rows."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import UserError, short
from ..fields import check_unknown, either, identity_of, row_images, wrong_field
from ..rows import KNOWN, REGION, region_row
from .conventions import Boxes
from .source import Record, Source, arrays, objects, picture_path, picture_size

CROWD = "boxes of a crowd left out"
_EXPRESSIONS = ("expressions", "sentences", "sents", "sent", "expression", "phrase", "answer", "caption")


class CocoImage(NamedTuple):
    """An entry of `images`; `caption` is that of MDETR's referring files, else empty."""

    path: str
    size: tuple[int, int]
    caption: str = ""


def coco(source: Source) -> Iterator[dict]:
    """COCO and Objects365: `{"images", "annotations": [{"image_id", "category_id", "bbox": xywh}], "categories"}`.

    MDETR's files of RefCOCO, RefCOCO+ and RefCOCOg have this layout with a `caption` for every image entry: it becomes
    the expression. A row whose category also has a crowd in its image says so: `crowds` counts their boxes. The file is
    read twice, first for images, categories and crowds; memory is that of these, not of the annotations.
    """
    images, categories, crowds = _read_tables(source, "images", "categories", "annotations")
    boxes = source.boxes("xywh")
    for number, (_, r) in enumerate(arrays(source, "annotations"), 1):
        image = _look_up(images, r, "image_id")
        if _is_crowd(r):
            source.notes[CROWD] += 1
            continue
        more = {
            "category": _look_up(categories, r, "category_id"),
            "crowds": crowds[r.raw["image_id"], r.raw["category_id"]],
            "expressions": [image.caption] if image.caption else None,
        }
        identity = r.text("id") if r.raw.get("id") is not None else str(number)
        yield from _region(r, boxes, identity, image.path, image.size, more)
    boxes.check()


def _read_tables(source: Source, *names: str) -> tuple[dict, dict, Counter]:
    """`({image id: CocoImage}, {category id: name}, {(image id, category id): crowds})`; crowds need `annotations`."""
    images, categories, crowds = {}, {}, Counter()
    for name, r in arrays(source, *names):
        if name == "annotations":
            if _is_crowd(r):
                crowds[r.take("image_id", int, str), r.take("category_id", int, str)] += 1
        elif name == "categories":
            _enter(categories, r, r.text("name"))
        else:
            caption = r.take("caption", str).strip() if r.raw.get("caption") is not None else ""
            image = CocoImage(picture_path(r, r.text("file_name")), r.size(), caption)
            _enter(images, r, image)
    return images, categories, crowds


def _enter(table: dict, r: Record, value: Any) -> None:
    """Add an image or category under its `id`. Raises RowError: another one has it."""
    identity = r.take("id", int, str)
    if table.setdefault(identity, value) != value:
        raise r.wrong(f"field `id`: {short(identity)} is there twice, for different things. Make ids unique.")


def _is_crowd(r: Record) -> bool:
    value = r.raw.get("iscrowd")
    if value not in (None, 0, 1):
        raise wrong_field("iscrowd", "0 or 1", value, r.where)
    return bool(value)


def _look_up(table: dict, r: Record, field: str) -> Any:
    identity = r.take(field, int, str)
    if identity not in table:
        raise r.wrong(f"field `{field}`: there is no {short(identity)} in the file. Is it complete?")
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
    annotations = {
        r.raw["id"]: {name: r.raw.get(name) for name in ("bbox", "category_id")}
        for _, r in arrays(instances, "annotations")
        if r.take("id", int, str) in annotated
    }
    boxes, splits = source.boxes("xywh"), Counter()
    for r in objects(source):
        split = r.text("split") if r.raw.get("split") is not None else None
        splits[split] += 1
        if source.split and split != source.split:
            continue
        image, annotation = _look_up(images, r, "image_id"), _look_up(annotations, r, "ann_id")
        texts, identity = (
            _texts(r, "sentences"),
            r.text("ann_id" if r.raw.get("ref_id") is None else "ref_id"),
        )
        r = r._replace(raw=annotation)
        category = r.take("category_id", int, str) if r.raw["category_id"] is not None else None
        more = {"expressions": texts, "category": categories.get(category), "split": split}
        yield from _region(r, boxes, identity, image.path, image.size, more)
    if source.split and source.split not in splits:
        names = ", ".join(sorted(filter(None, splits))) or "none"
        raise UserError(f"{source.path}: there is no split {source.split!r}. The refs have: {names}.")
    boxes.check()


def sc_tune(source: Source) -> Iterator[dict]:
    """SC-Tune's released list: `image_id` (a file name) and `bbox` [x0, y0, x1, y1] as shares of the image.

    The list has no sizes, so every image is opened: below the folder of the source, else of the target.
    """
    boxes = source.boxes("norm1")
    for r in objects(source):
        name = r.text("image_id")
        yield from _region(r, boxes, f"{Path(name).stem}-{r.key}", picture_path(r, name))
    boxes.check()


def rec(source: Source) -> Iterator[dict]:
    """One object a row: `image`, `bbox` or `box`, and its expressions under one of the usual names.

    Width and height are read from the image where the row lacks them.
    """
    boxes = source.boxes()
    for r in objects(source):
        yield from rec_rows(r, boxes)
    boxes.check()


def rec_rows(r: Record, boxes: Boxes) -> Iterator[dict]:
    """The region row of one record, if its box has an area inside the image; columns that it does not hold are counted."""
    images = row_images(r.raw, r.where)
    if len(images) != 1:
        raise wrong_field("image", "one image for the box", images, r.where)
    text = next((name for name in _EXPRESSIONS if r.raw.get(name)), None)
    check_unknown(r.raw, KNOWN[REGION] | {"bbox", text}, r.where, r.source.notes, images)
    more = {"expressions": _texts(r, text) if text else None}
    for name in ("category", "split", "crowds"):
        more[name] = r.take(name, str, int) if r.raw.get(name) is not None else None
    size = r.size() if r.raw.get("width") is not None and r.raw.get("height") is not None else None
    r = r._replace(raw=r.raw | {"bbox": either(r.raw, "bbox", "box", r.where)})
    path = picture_path(r, images[0])
    yield from _region(r, boxes, identity_of(r.raw, r.where), path, size, more)


def _region(
    r: Record,
    boxes: Boxes,
    identity: str,
    path: str,
    size: tuple[int, int] | None = None,
    more: dict[str, Any] | None = None,
) -> Iterator[dict]:
    """The row of a record's box, clipped to its image; none where nothing of it is left. Empty fields are left out.

    Args:
        path: of the image, in rows.
        size: that the file gives, if it does.
    """
    size, where = picture_size(r, path, size, boxes.sizes), r.where
    if (inside := boxes.read(r.raw.get("bbox"), size, where)) is None:
        return
    row = {"id": identity, "image": path, "width": size[0], "height": size[1], "box": inside}
    yield region_row(row | {name: value for name, value in (more or {}).items() if value}, where)


def _texts(r: Record, field: str) -> list[str]:
    value = r.raw.get(field)
    items = value if isinstance(value, list) else [value]
    texts = [item.get("sent", item.get("raw")) if isinstance(item, dict) else item for item in items]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise wrong_field(field, "expressions", value, r.where)
    return [text.strip() for text in texts]
