"""Referring expressions, and boxes to find them for -> region rows."""

from collections.abc import Iterator
from pathlib import Path

from ...errors import UserError
from ..box_fields import check_box, clip, from_xywh
from ..images import open_image
from ..json_stream import stream_json_arrays
from ..problems import FORMAT, RowError
from ..rows import read_raw
from .detection import CLIPPED, EMPTY, look_up, read_images, region_box
from .source import Source, take, take_text

_EXPRESSIONS = ("expressions", "sentences", "sents", "sent", "expression", "phrase", "answer", "caption")


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
    images, categories = read_images(source, source.annotations)
    wanted = {take(raw, "ann_id", (int, str), source.at(n)) for n, raw in read_raw(source.path)}
    boxes = {
        raw["id"]: (raw.get("bbox"), raw.get("category_id"))
        for _, _, raw in stream_json_arrays(source.annotations, {"annotations"})
        if raw.get("id") in wanted
    }
    for number, raw in read_raw(source.path):
        where = source.at(number)
        if source.split and raw.get("split") != source.split:
            continue
        image = look_up(images, take(raw, "image_id", (int, str), where), "image_id", where)
        xywh, category = look_up(boxes, raw["ann_id"], "ann_id", where)
        box = region_box(source, xywh, image, where)
        if box is None:
            continue
        row = {
            "id": str(raw.get("ref_id", raw["ann_id"])),
            "image": source.image(image.name),
            "width": image.width,
            "height": image.height,
            "box": box,
            "expressions": _texts(take(raw, "sentences", list, where), "sentences", where),
        }
        if category in categories:
            row["category"] = categories[category]
        if raw.get("split"):
            row["split"] = str(raw["split"])
        yield row


def rec(source: Source) -> Iterator[dict]:
    """One object a row: `image`, `bbox` or `box`, and its expressions under one of the usual names.

    Width and height are read from the image where the row lacks them.
    """
    for number, raw in read_raw(source.path):
        row = rec_row(raw, source, number)
        if row is not None:
            yield row


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
        width, height = sizes[name]
        box = [share * side for share, side in zip(shares, (width, height) * 2, strict=True)]
        inside = clip(check_box(box, where), width, height)
        if inside is None:
            source.notes[EMPTY] += 1
            continue
        yield {
            "id": f"{Path(name).stem}-{number}",
            "image": source.image(name),
            "width": width,
            "height": height,
            "box": inside,
        }


def rec_row(raw: dict, source: Source, number: int | str) -> dict | None:
    """One region row; None, and counted, when its box has no area inside the image."""
    where = source.at(number)
    name = "box" if raw.get("box") is not None else "bbox"
    box = raw.get(name)
    box = from_xywh(box, where) if source.box_format == "xywh" else check_box(box, where, name)
    images = raw.get("images")
    image = images[0] if isinstance(images, list) and len(images) == 1 else take_text(raw, "image", where)
    width, height = _size(raw, source, image, where)
    inside = clip(box, width, height)
    if inside is None:
        source.notes[EMPTY] += 1
        return None
    source.notes[CLIPPED] += inside != box
    row = {
        "id": str(raw.get("id", raw.get("question_id", f"{source.path.stem}-{number}"))),
        "image": source.image(image),
        "width": width,
        "height": height,
        "box": inside,
    }
    field = next((f for f in _EXPRESSIONS if raw.get(f)), None)
    if field is not None:
        row["expressions"] = _texts(raw[field], field, where)
    return row | {name: raw[name] for name in ("category", "split") if raw.get(name)}


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
