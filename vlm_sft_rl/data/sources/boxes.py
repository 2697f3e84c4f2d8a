"""Detection sets and referring expressions -> region rows."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import FORMAT, RowError, UserError
from ...io import stream_json_arrays
from ..images import open_image
from ..rows import check_box, clip, from_xywh, read_raw
from .source import Source, take, take_text

CROWD = "boxes of a crowd left out"
CLIPPED = "boxes clipped to the image"
EMPTY = "boxes without area left out"
_EXPRESSIONS = ("expressions", "sentences", "sents", "sent", "expression", "phrase", "answer", "caption")


class CocoImage(NamedTuple):
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
        image = _look_up(images, raw, "image_id", where)
        if raw.get("iscrowd"):
            source.notes[CROWD] += 1
            continue
        category = _look_up(categories, raw, "category_id", where)
        box = from_xywh(take(raw, "bbox", list, where), where)
        more = {
            "category": category,
            "crowds": crowds[raw["image_id"], raw["category_id"]],
            "expressions": [image.caption] if image.caption else None,
        }
        yield from _region(source, raw.get("id", number), image.name, (image.width, image.height), box, more)


def _read_tables(path: Path, keys: set[str]) -> tuple[dict, dict, Counter]:
    """`({image id: CocoImage}, {category id: name}, {(image id, category id): crowds})`; crowds need `annotations`."""
    images, categories, crowds = {}, {}, Counter()
    for key, number, raw in stream_json_arrays(path, keys):
        where = f"{path}:{key}[{number}]"
        if key == "annotations":
            if isinstance(raw, dict) and raw.get("iscrowd"):
                image, category = (take(raw, name, (int, str), where) for name in ("image_id", "category_id"))
                crowds[image, category] += 1
            continue
        identity = take(raw, "id", (int, str), where)
        if key == "categories":
            categories[identity] = take_text(raw, "name", where)
            continue
        width, height = (take(raw, name, (int, float), where) for name in ("width", "height"))
        if min(width, height) <= 0:
            raise RowError(FORMAT, f"image of {width} x {height} pixels.", where)
        caption = str(raw.get("caption") or "").strip()
        images[identity] = CocoImage(take_text(raw, "file_name", where), int(width), int(height), caption)
    return images, categories, crowds


def _look_up(table: dict, raw: dict, field: str, where: str) -> Any:
    identity = take(raw, field, (int, str), where)
    if identity not in table:
        raise RowError(
            FORMAT, f"field `{field}`: there is no {identity!r} in the file. Is it complete?", where
        )
    return table[identity]


def refcoco(source: Source) -> Iterator[dict]:
    """The refs of RefCOCO, RefCOCO+ or RefCOCOg as JSON, with the boxes of `instances.json`; one row a ref.

    A ref is `{"ref_id", "ann_id", "image_id", "split", "sentences": [{"sent"}]}`. The published `refs(….p)` is a
    pickle, which is not read: a pickle runs code. Write it as JSON where you trust it.

    `source.split` leaves the refs of one split; None reads all.

    Raises:
        UserError: no annotations file. RowError: a ref names an image or annotation that the file lacks.
    """
    if source.annotations is None:
        raise UserError("The format 'refcoco' needs the boxes too: --annotations instances.json.")
    images, categories, _ = _read_tables(source.annotations, {"images", "categories"})
    annotated = {take(raw, "ann_id", (int, str), source.at(n)) for n, raw in read_raw(source.path)}
    boxes = {
        raw["id"]: (raw.get("bbox"), raw.get("category_id"))
        for _, _, raw in stream_json_arrays(source.annotations, {"annotations"})
        if raw.get("id") in annotated
    }
    for number, raw in read_raw(source.path):
        where = source.at(number)
        if source.split and raw.get("split") != source.split:
            continue
        image = _look_up(images, raw, "image_id", where)
        xywh, category = _look_up(boxes, raw, "ann_id", where)
        more = {
            "expressions": _texts(take(raw, "sentences", list, where), "sentences", where),
            "category": categories.get(category),
            "split": raw.get("split") and str(raw["split"]),
        }
        identity, size = raw.get("ref_id", raw["ann_id"]), (image.width, image.height)
        yield from _region(source, identity, image.name, size, from_xywh(xywh, where), more)


def sc_tune(source: Source) -> Iterator[dict]:
    """SC-Tune's released list: `image_id` (a file name) and `bbox` [x0, y0, x1, y1] as shares of the image.

    The list has no sizes, so every image is opened: below the folder of the source, else of the target.
    """
    sizes: dict[str, tuple[int, int]] = {}
    for number, raw in read_raw(source.path):
        where = source.at(number)
        name = take_text(raw, "image_id", where)
        shares = check_box(raw.get("bbox"), where, "bbox", digits=None)
        if not all(0 <= share <= 1 for share in shares):
            raise RowError(FORMAT, f"field `bbox`: expected four shares from 0 to 1, found {shares}.", where)
        if name not in sizes:
            sizes[name] = _size(raw, source, name, where)
        box = [share * side for share, side in zip(shares, sizes[name] * 2, strict=True)]
        yield from _region(source, f"{Path(name).stem}-{number}", name, sizes[name], check_box(box, where))


def rec(source: Source) -> Iterator[dict]:
    """One object a row: `image`, `bbox` or `box`, and its expressions under one of the usual names.

    Width and height are read from the image where the row lacks them.
    """
    for number, raw in read_raw(source.path):
        yield from rec_rows(raw, source, number)


def rec_rows(raw: dict, source: Source, number: int | str) -> Iterator[dict]:
    """The region row of one record, if its box has an area inside the image."""
    where = source.at(number)
    name = "box" if raw.get("box") is not None else "bbox"
    is_xywh = source.box_format == "xywh"
    box = from_xywh(raw.get(name), where) if is_xywh else check_box(raw.get(name), where, name)
    images = raw.get("images")
    image = images[0] if isinstance(images, list) and len(images) == 1 else take_text(raw, "image", where)
    field = next((f for f in _EXPRESSIONS if raw.get(f)), None)
    size = _size(raw, source, image, where)
    if field is not None:
        raw = {**raw, "expressions": _texts(raw[field], field, where)}
    more = {name: raw.get(name) for name in ("expressions", "category", "split")}
    identity = raw.get("id", raw.get("question_id", f"{source.path.stem}-{number}"))
    yield from _region(source, identity, image, size, box, more)


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
    source.notes[CLIPPED] += inside != box
    row = {
        "id": str(identity),
        "image": source.image(image),
        "width": size[0],
        "height": size[1],
        "box": inside,
    }
    yield row | {name: value for name, value in (more or {}).items() if value}


def _texts(value: object, field: str, where: str) -> list[str]:
    items = value if isinstance(value, list) else [value]
    texts = [item.get("sent", item.get("raw")) if isinstance(item, dict) else item for item in items]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise RowError(FORMAT, f"field `{field}`: expected expressions, found {value!r:.80}.", where)
    return [text.strip() for text in texts]


def _size(raw: dict, source: Source, image: str, where: str) -> tuple[int, int]:
    if raw.get("width") is not None and raw.get("height") is not None:
        return int(take(raw, "width", (int, float), where)), int(take(raw, "height", (int, float), where))
    roots = [Path(source.path).parent, *([source.images_base] if source.images_base else [])]
    name = source.image(image)
    root = next((root for root in roots if (root / name).is_file()), roots[0])
    try:
        return open_image(name, root).size
    except RowError as error:
        raise RowError(
            error.kind, f"no `width` and `height`, and its image cannot tell: {error.reason}", where
        ) from error
