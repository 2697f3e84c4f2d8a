"""The TSV files that MMBench and VLMEvalKit publish: pictures as base64 in a column."""

import base64
import binascii
import csv
from collections.abc import Iterator
from pathlib import Path

from ...data.images import store_image
from ...data.sources.questions import LETTERS
from ...data.sources.source import Source, take_text
from ...errors import FORMAT, UNREADABLE_IMAGE, RowError, UserError

CIRCLE = 1_000_000  # rotations of question i have the indices i + k * CIRCLE
_LARGEST_FIELD = 1 << 30


def tsv(source: Source, circular: bool = False, split: str | None = None) -> Iterator[dict]:
    """`index`, `question`, `hint`?, `A`, `B`, …, `answer`, `category`?, `image` (base64, or the index of the row that has
    it), `split`?.

    Args:
        circular: rows are rotations of questions; `circle` is filled with the question's index.
        split: only rows of this split.
    """
    csv.field_size_limit(_LARGEST_FIELD)
    pictures: dict[str, str] = {}
    with open(source.path, encoding="utf-8", newline="") as handle:
        reader = csv.DictReader(handle, delimiter="\t")
        for name in ("index", "question", "answer", "image"):
            if name not in (reader.fieldnames or ()):
                raise UserError(
                    f"{source.path}: no column {name!r}, found {reader.fieldnames}. Is it a TSV of MMBench's?"
                )
        for number, raw in enumerate(reader, 1):
            where = source.at(number)
            index, image = take_text(raw, "index", where), take_text(raw, "image", where)
            pictures[index] = pictures[image] if image in pictures else _write(image, source, where)
            if split is not None and raw.get("split") != split:
                continue
            choices = [
                raw[letter].strip()
                for letter in LETTERS[:10]
                if (raw.get(letter) or "").strip() not in ("", "nan")
            ]
            hint = (raw.get("hint") or "").strip()
            row = {
                "id": index,
                "images": [pictures[index]],
                "question": f"{hint}\n{raw['question']}"
                if hint and hint != "nan"
                else take_text(raw, "question", where),
                "answer": take_text(raw, "answer", where),
            }
            row |= {"choices": choices} if choices else {}
            row |= {"category": raw["category"]} if raw.get("category") else {}
            if circular:
                if not index.isdigit():
                    raise RowError(FORMAT, f"`index`: expected a number, found {index!r}.", where)
                row["circle"] = str(int(index) % CIRCLE)
            yield row


def _write(text: str, source: Source, where: str) -> str:
    """The picture's file, named by its content, relative to `images_base`."""
    try:
        data = base64.b64decode(text, validate=True)
        path = store_image(data, Path(source.images_dir))
    except (binascii.Error, OSError, ValueError) as error:
        raise RowError(
            UNREADABLE_IMAGE,
            f"`image` is neither a picture in base64 nor an index before it ({error}).",
            where,
        ) from error
    return path.relative_to(source.images_base or source.images_dir).as_posix()
