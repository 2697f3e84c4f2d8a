"""Captions and boxes: COCO, Karpathy's split files, RefCOCO, our own region rows and question rows."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from ...data.fields import PICTURES, is_number
from ...data.rows import question_row, region_row
from ...data.sources import boxes
from ...data.sources.conventions import EMPTY
from ...data.sources.source import Record, Source, arrays, objects, picture_size
from ...errors import FORMAT, RowError, UserError, short
from ...io import read_jsonl
from .records import array, maybe, row, stored, whole_number, written_picture

DESCRIBE = "Describe this image."
PER = ("region", "expression")
DISTRACTORS = {1: "below 2", 3: "2-3", 6: "4-6", math.inf: "7 and more"}  # at most so many -> their group
SPLITS = ("val", "testA", "testB", "test")


def rows(source: Source) -> Iterator[tuple[str, dict]]:
    """JSONL of question rows, read as training and `data validate` read them."""
    for number, raw in read_jsonl(source.path):
        question = question_row(raw, f"{source.path}:{number}")
        if not raw.keys() & set(PICTURES):
            del question["images"]  # a question of text alone says so
        yield f"{source.path}, line {number}", question


def coco_objects(source: Source, instances: Path, captions: Path) -> Iterator[dict]:
    """Pictures of COCO 2014 with what is in them. The question file is JSONL with `question_id`, `image`, `text`.

    Args:
        instances: `instances_val2014.json`.
        captions: `captions_val2014.json`.
    """
    pictures = [(r, _coco_id(r)) for r in objects(source)]
    for r, truth in _coco_truth(source, pictures, instances, captions):
        yield row(r.text("question_id"), r.picture("image"), r.text("text"), **truth)


def object_halbench(source: Source, instances: Path, captions: Path) -> Iterator[dict]:
    """`obj_halbench_300_with_image.jsonl`: `image_id`, `question`, `image` (base64), an object a line. Its pictures are of
    COCO's val2014; the owners' script reads train2014 beside it, which holds nothing about them.

    Args:
        instances: `instances_val2014.json`.
        captions: `captions_val2014.json`.
    """
    # without the pictures, of which one file holds 60 MB
    pictures = [
        (
            r._replace(raw={**r.checked().raw, "image": written_picture(r.text("image"), r)}),
            whole_number(r, "image_id"),
        )
        for r in objects(source)
    ]
    for r, truth in _coco_truth(source, pictures, instances, captions):
        yield row(r.text("image_id"), [r.raw["image"]], r.text("question"), **truth)


def _coco_truth(
    source: Source, pictures: list[tuple[Record, int]], instances: Path, captions: Path
) -> Iterator[tuple[Record, dict]]:
    """Each record with the names of the categories in its picture and the captions of people; `pictures` has the ids."""
    wanted = {identity for _, identity in pictures}
    names, categories, texts = {}, defaultdict(set), defaultdict(list)
    for key, r in arrays(replace(source, path=instances), "categories", "annotations"):
        if key == "categories":
            names[r.take("id", int)] = r.text("name")
        elif (identity := r.take("image_id", int)) in wanted:
            category = r.take("category_id", int)
            categories[identity].add((category, r.where))
    for r in array(replace(source, path=captions), "annotations"):
        if (identity := r.take("image_id", int)) in wanted:
            texts[identity].append(r.text("caption"))
    for r, identity in pictures:
        if identity not in texts:
            raise r.wrong(f"picture {identity} has no caption in {captions}: another split?")
        if strange := [place for category, place in categories[identity] if category not in names]:
            raise RowError(FORMAT, "its category is none of the file's.", min(strange))
        present = sorted({names[category] for category, _ in categories[identity]})
        yield r, {"instances": present, "captions": texts[identity]}


def _coco_id(record: Record) -> int:
    name = record.text("image")
    digits = Path(name).stem.rsplit("_", 1)[-1]
    if not digits.isdecimal():
        raise record.wrong(f"`image`: expected a name such as COCO_val2014_000000000042.jpg, found {name!r}.")
    return int(digits)


def coco_captions(source: Source, question: str = DESCRIBE) -> Iterator[dict]:
    """A captions file in COCO's schema: `images` (`id`, `file_name`) and `annotations` (`image_id`, `caption`).

    Args:
        question: what the model is asked.
    """
    images, texts = [], defaultdict(list)
    for key, r in arrays(source, "images", "annotations"):
        if key == "images":
            images.append(r)
        else:
            texts[r.text("image_id")].append(r.text("caption"))
    for r in images:
        identity = r.text("id")
        if not texts[identity]:
            raise r.wrong(f"picture {identity} has no caption.")
        fields = {"captions": texts[identity], "category": r.raw.get("domain")}
        yield row(identity, r.picture("file_name"), question, **fields)


def karpathy(source: Source, split: str = "test", question: str = DESCRIBE) -> Iterator[dict]:
    """`dataset_flickr30k.json`: `{"images": [{"filename", "split", "sentences": [{"raw"}]}]}`.

    Args:
        split: which pictures.
        question: what the model is asked.
    """
    for r in array(source, "images"):
        if r.raw.get("split") == split:
            captions = [r._replace(raw=sentence).text("raw") for sentence in r.take("sentences", list)]
            images = r.picture("filename", maybe(r, "filepath", str) or "")
            identity = r.text("imgid") if "imgid" in r.raw else str(r.key)
            yield row(identity, images, question, captions=captions)


def regions(source: Source, per: str = "region") -> Iterator[tuple[str, dict]]:
    """JSONL of region rows; rows with `split`, else with `category`, are reported by it.

    Args:
        per: a question for each `region`, or for each `expression` of one.
    """
    sizes: dict = {}
    for number, raw in read_jsonl(source.path):
        where = f"{source.path}, line {number}"
        region = region_row(raw, where)
        size = region["width"], region["height"]
        picture_size(Record(source, number, raw), region["image"], size, sizes)
        yield from _region_questions(where, raw, raw.get("split") or raw.get("category"), per)


def refcoco(
    source: Source, instances: Path, per: str = "region", splits: Iterable[str] = SPLITS
) -> Iterator[tuple[str, dict]]:
    """The refs of RefCOCO, RefCOCO+ or RefCOCOg as JSON; the category of a question is its split.

    Args:
        instances: the boxes: the `instances.json` beside the refs, or COCO's `instances_train2014.json`, whose ids they
            keep.
        per: a question for each `region`, or for each `expression` of one.
        splits: which parts.
    """
    source, splits = replace(source, annotations=instances), set(splits)
    for raw in boxes.refcoco(source):
        if raw.get("split") in splits:
            yield from _region_questions(f"{source.path}:{raw['id']}", raw, raw["split"], per)
    if empty := source.notes[EMPTY]:
        reason = f"{empty} refs have a box without area: their boxes are others."
        raise RowError(FORMAT, reason, str(instances))


def ref_adv(source: Source, split: str | None = None) -> Iterator[tuple[str, dict]]:
    """Ref-Adv-s as parquet: `image`, `normal_caption`, `solution` (the box, xyxy pixels), `width`, `height`, `distractors`.

    A question's category is how many distractors the picture has, in the groups of the owners' report.

    Args:
        split: which files of a folder.
    """
    for r in stored(source, split):
        count = _distractors(r)
        category = next(name for most, name in DISTRACTORS.items() if count <= most)
        region = {name: r.raw.get(name) for name in ("width", "height")}
        region |= {"id": str(r.key), "image": r.text("image"), "box": r.raw.get("solution")}
        yield from _region_questions(
            r.where, region | {"expressions": [r.text("normal_caption")]}, category, "expression"
        )


def _distractors(record: Record) -> int:
    """How many there are, as the owners count: a number, the length of a list (also as JSON), or the numbers in a text.

    Raises RowError: there is no such column, or it holds something else.
    """
    if "distractors" not in record.raw:
        raise record.wrong("no column `distractors`, by whose number the figures are split.")
    value = record.raw["distractors"]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = re.findall(r"\d+", value)
    if isinstance(value, list):
        return len(value)
    if value is not None and not is_number(value):
        raise record.wrong(f"`distractors`: expected a number, a list or text, found {short(value)}.")
    return int(value or 0)


def _region_questions(where: str, raw: dict, category: str | None, per: str) -> Iterator[tuple[str, dict]]:
    if per not in PER:
        raise UserError(f"reader_options: 'per' must be one of {', '.join(PER)}, found {per!r}.")
    region = region_row(raw, where)
    expressions = region.get("expressions") or None
    fields = {name: region[name] for name in ("image", "box", "width", "height")}
    fields |= {"captions": expressions, "category": category}
    if per == "region":
        box = ", ".join(f"{value:.5g}" for value in region["box"])
        yield where, row(region["id"], [region["image"]], f"[{box}]", **fields)
    elif expressions is None:
        raise RowError(FORMAT, "no field `expressions`, so there is nothing to locate.", where)
    else:
        for number, text in enumerate(expressions):
            yield where, row(f"{region['id']}#{number}", [region["image"]], text, **fields)
