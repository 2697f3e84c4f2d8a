"""Benchmarks with free answers that a judge grades: MMHal-Bench, HaloQuest, MM-Vet."""

import csv
from collections.abc import Iterator
from pathlib import PurePosixPath

from ...data.rows import read_raw
from ...data.sources.source import Source, take, take_text
from ...errors import UserError
from ...io import read_json


def mmhal(source: Source) -> Iterator[dict]:
    """MMHal-Bench `response_template.json`: `question_type`, `image_id`, `image_src`, `image_content`, `question`,
    `gt_answer`; pictures in `images/` under the last part of `image_src`."""
    for number, raw in read_raw(source.path):
        where = source.at(number)
        name = PurePosixPath(take_text(raw, "image_src", where)).name
        yield {
            "id": f"{number}-{take_text(raw, 'image_id', where)}",
            "images": [source.image("images", name)],
            "question": take_text(raw, "question", where),
            "answer": take_text(raw, "gt_answer", where),
            "image_content": take(raw, "image_content", list, where),
            "category": take_text(raw, "question_type", where),
        }


def haloquest(source: Source) -> Iterator[dict]:
    """`haloquest-eval.csv`: `image_name`, `url`, `hallucination type`, `question`, `groundtruth responses` (separated by
    `;`), `split`; pictures in `images/`. Rows of another split than "eval" are left out: the owners also publish all in
    one file."""
    columns = ("image_name", "hallucination type", "question", "groundtruth responses")
    with open(source.path, encoding="utf-8", newline="") as handle:
        reader = csv.DictReader(handle)
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            raise UserError(
                f"{source.path}: no column {missing[0]!r}, found {reader.fieldnames}. Expected haloquest-eval.csv."
            )
        for number, raw in enumerate(reader, 1):
            where = source.at(number)
            if (raw.get("split") or "eval").strip() != "eval":
                continue
            yield {
                "id": f"haloquest-{number}",
                "images": [source.image("images", take_text(raw, "image_name", where))],
                "question": take_text(raw, "question", where),
                "answer": take_text(raw, "groundtruth responses", where),
                "category": take_text(raw, "hallucination type", where),
            }


def mm_vet(source: Source) -> Iterator[dict]:
    """`mm-vet.json`: id -> `imagename`, `question`, `answer` (with `<AND>`, `<OR>`), `capability` (several)."""
    for identity, raw in read_json(source.path).items():
        where = source.at(identity)
        yield {
            "id": identity,
            "images": [source.image("images", take_text(raw, "imagename", where))],
            "question": take_text(raw, "question", where),
            "answer": take_text(raw, "answer", where),
            "category": sorted(take(raw, "capability", list, where)),
        }
