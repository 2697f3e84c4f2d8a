"""Detection JSON -> region rows with `category`."""

import heapq
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ...errors import FORMAT, RowError, UserError
from ...io import stream_json_arrays
from ..images import open_image
from ..rows import check_box, clip, from_xywh, read_raw
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


# Referring expressions, and boxes to find them for -> region rows.
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


# Which region rows are worth describing.
@dataclass
class _Own:
    """The regions of one category in one image: how many, crowds apart, and the largest within the limits of size."""

    count: int = 0
    crowds: int = 0
    largest: list[tuple[float, int]] = field(
        default_factory=list
    )  # (area, minus the number of the row), a heap

    @property
    def same(self) -> int:
        return self.count + self.crowds


@dataclass(frozen=True)
class RegionFilter:
    """Limits; every limit None or 0 is off.

    Attributes:
        min_side: shortest side in pixels: the IoU of tiny boxes is noise.
        min_area, max_area: share of the image's area.
        max_same_category: at most so many regions of one category in an image; 1 keeps categories that are unique in it.
            A crowd counts as one, though it is no row (field `crowds`).
        max_per_image: regions kept of one image, the largest first.

    Raises:
        UserError: a limit out of range.
    """

    min_side: float = 0
    min_area: float = 0.0
    max_area: float = 1.0
    max_same_category: int | None = None
    max_per_image: int | None = None

    def __post_init__(self):
        if not 0 <= self.min_area <= self.max_area <= 1:
            raise UserError(
                f"region filter: expected 0 <= min_area <= max_area <= 1, found {self.min_area} and {self.max_area}."
            )
        for name in ("max_same_category", "max_per_image"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"region filter: {name} = {getattr(self, name)}, expected at least 1.")

    def apply(self, read: Callable[[Counter], Iterator[dict]], notes: Counter) -> Iterator[dict]:
        """Yield the regions kept, in their order; `notes` counts the others by reason.

        Uniqueness is judged before the limits of size: a small twin makes a description ambiguous too. What is unique or
        largest in an image is known when all rows were seen, so then they are read twice, and what is held meanwhile is a
        count and a few areas for each image and category.

        Args:
            read: gives the rows anew at each call, and counts what it leaves out in the counter it is given.

        Raises:
            RowError: a row that is no region, or `max_same_category` and a region without `category`.
        """
        found = self._survey(read(Counter())) if self.max_same_category or self.max_per_image else {}
        largest = self._largest(found) if self.max_per_image else None
        for number, row in enumerate(read(notes)):
            reason = self._outside(row)
            if reason is None and self.max_same_category:
                own = found[row["image"]][row["category"]]
                reason = "category not unique" if own.same > self.max_same_category else None
            if reason is None and largest is not None and number not in largest:
                reason = "more regions than max_per_image"
            if reason is None:
                yield row
            else:
                notes[reason] += 1

    def _survey(self, rows: Iterator[dict]) -> dict[str, dict[str | None, _Own]]:
        found: dict[str, dict[str | None, _Own]] = {}
        for number, row in enumerate(rows):
            outside = self._outside(row)
            if self.max_same_category and row.get("category") is None:
                raise RowError(FORMAT, "max_same_category needs the field `category`.", str(row["id"]))
            category = row["category"] if self.max_same_category else None
            own = found.setdefault(row["image"], {}).setdefault(category, _Own())
            own.count += 1
            own.crowds = row.get("crowds", 0)
            if self.max_per_image and outside is None:
                heapq.heappush(own.largest, (_area(row), -number))
                if len(own.largest) > self.max_per_image:
                    heapq.heappop(own.largest)
        return found

    def _largest(self, found: dict[str, dict[str | None, _Own]]) -> set[int]:
        """The numbers of the rows that may stay."""
        chosen: set[int] = set()
        for image in found.values():
            allowed = [
                own
                for own in image.values()
                if not self.max_same_category or own.same <= self.max_same_category
            ]
            best = heapq.nlargest(self.max_per_image, (pair for own in allowed for pair in own.largest))
            chosen.update(-number for _, number in best)
        return chosen

    def _outside(self, row: dict) -> str | None:
        if row.get("box") is None:
            raise RowError(
                FORMAT,
                "the limits on regions are for region rows, and this row has no `box`.",
                str(row.get("id")),
            )
        x0, y0, x1, y1 = row["box"]
        share = _area(row) / (row["width"] * row["height"])
        if min(x1 - x0, y1 - y0) < self.min_side:
            return "side shorter than min_side"
        if share < self.min_area:
            return "smaller than min_area"
        return "larger than max_area" if share > self.max_area else None


def _area(row: dict) -> float:
    x0, y0, x1, y1 = row["box"]
    return (x1 - x0) * (y1 - y0)
