"""Captioning: COCO (objects for CHAIR, captions for CLAIR and NoCaps) and Karpathy's split files (Flickr30k)."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from ...data.rows import read_raw
from ...data.sources.source import Source, take, take_text
from ...errors import FORMAT, RowError
from ...io import stream_json_arrays

DESCRIBE = "Describe this image."


def coco_objects(source: Source, instances: Path, captions: Path) -> Iterator[dict]:
    """Pictures of COCO 2014 with what is in them. The question file is JSONL with `question_id`, `image`, `text`.

    Args:
        instances: `instances_val2014.json`.
        captions: `captions_val2014.json`.
    """
    asked = [(source.at(number), raw) for number, raw in read_raw(source.path)]
    wanted = {_coco_id(take_text(raw, "image", where), where) for where, raw in asked}
    names, found = {}, defaultdict(set)
    for key, _, item in stream_json_arrays(instances, ("categories", "annotations")):
        if key == "categories":
            names[item["id"]] = item["name"]
        elif item["image_id"] in wanted:
            found[item["image_id"]].add(item["category_id"])
    told = _captions(captions, wanted)
    for where, raw in asked:
        image = take_text(raw, "image", where)
        identity = _coco_id(image, where)
        if identity not in told:
            raise RowError(FORMAT, f"picture {identity} has no caption in {captions}: another split?", where)
        yield {
            "id": take_text(raw, "question_id", where),
            "images": [source.image(image)],
            "question": take_text(raw, "text", where),
            "instances": sorted(names[category] for category in found[identity]),
            "captions": told[identity],
        }


def coco_captions(source: Source, question: str = DESCRIBE) -> Iterator[dict]:
    """A captions file in COCO's schema: `images` (`id`, `file_name`) and `annotations` (`image_id`, `caption`).

    Args:
        question: what the model is asked.
    """
    images, told = [], defaultdict(list)
    for key, _, item in stream_json_arrays(source.path, ("images", "annotations")):
        if key == "images":
            images.append(item)
        else:
            told[item["image_id"]].append(str(item["caption"]).strip())
    for number, image in enumerate(images, 1):
        where = source.at(number)
        if not told[image["id"]]:
            raise RowError(FORMAT, f"picture {image['id']} has no caption.", where)
        row = {
            "id": str(image["id"]),
            "images": [source.image(take_text(image, "file_name", where))],
            "question": question,
            "captions": told[image["id"]],
        }
        yield row | ({"category": image["domain"]} if image.get("domain") else {})


def karpathy(source: Source, split: str = "test", question: str = DESCRIBE) -> Iterator[dict]:
    """`dataset_flickr30k.json`: `{"images": [{"filename", "split", "sentences": [{"raw"}]}]}`.

    Args:
        split: which pictures.
        question: what the model is asked.
    """
    for _, number, image in stream_json_arrays(source.path, ("images",)):
        where = source.at(number)
        if image.get("split") != split:
            continue
        sentences = take(image, "sentences", list, where)
        yield {
            "id": str(image.get("imgid", number)),
            "images": [source.image(image.get("filepath") or "", take_text(image, "filename", where))],
            "question": question,
            "captions": [take_text(sentence, "raw", where) for sentence in sentences],
        }


def _coco_id(name: str, where: str) -> int:
    digits = Path(name).stem.rsplit("_", 1)[-1]
    if not digits.isdigit():
        raise RowError(
            FORMAT, f"`image`: expected a name such as COCO_val2014_000000000042.jpg, found {name!r}.", where
        )
    return int(digits)


def _captions(path: Path, wanted: set[int]) -> dict[int, list[str]]:
    told: dict[int, list[str]] = defaultdict(list)
    for _, _, item in stream_json_arrays(path, ("annotations",)):
        if item["image_id"] in wanted:
            told[item["image_id"]].append(str(item["caption"]).strip())
    return dict(told)
