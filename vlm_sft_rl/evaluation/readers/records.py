"""The question row of a record, and the kinds of files that owners publish besides JSON."""

import base64
import csv
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...data.sources.arrow import read_records
from ...data.sources.source import Record, Source, arrays, picture_path
from ...errors import UNREADABLE_IMAGE, RowError, UserError, first_line, short
from ...io import open_file


def row(id: str, images: list[str], question: str, **fields: Any) -> dict:
    """A question row; fields that are None or empty text are left out."""
    known = {name: value for name, value in fields.items() if value not in (None, "")}
    return {"id": id, "images": images, "question": question, **known}


def array(source: Source, name: str) -> Iterator[Record]:
    """The list of that name in a JSON object."""
    return (r._replace(key=number) for number, (_, r) in enumerate(arrays(source, name), 1))


def maybe(record: Record, column: str, *kinds: type) -> Any:
    """A field of one of these types, or None where it is missing or null."""
    return record.take(column, *kinds) if record.raw.get(column) is not None else None


def stored(source: Source, split: str | None) -> Iterator[Record]:
    """Parquet files with the pictures inside, which become paths; `split` says which of a folder."""
    return (Record(source, number, raw) for number, raw in read_records(replace(source, split=split)))


def whole_number(record: Record, column: str) -> int:
    text = record.text(column)
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise record.wrong(f"`{column}`: expected a whole number, found {short(text)}.")
    return int(text)


def written_picture(text: str, record: Record, or_else: str = "") -> str:
    """The file of a picture that comes in base64, named by its content, relative to `images_base`.

    Raises RowError: it is none; `or_else` says what else it could have been.
    """
    try:
        return picture_path(record, base64.b64decode(text, validate=True))
    except (ValueError, RowError) as error:
        reason = f"`image` is no picture in base64{or_else} ({first_line(error)})."
        raise RowError(UNREADABLE_IMAGE, reason, record.where) from error


def table(source: Source, columns: tuple[str, ...], expected: str, delimiter: str = ",") -> Iterator[Record]:
    """Rows of a CSV file that has these columns; `expected` says which file that is."""
    number = 0
    with open_file(source.path, "r", encoding="utf-8", newline="") as handle:
        try:
            reader = csv.DictReader(handle, delimiter=delimiter)
            for name in columns:
                if name not in (reader.fieldnames or ()):
                    raise UserError(
                        f"{source.path}: no column {name!r}, found {short(reader.fieldnames, 200)}. Expected {expected}."
                    )
            for number, raw in enumerate(reader, 1):
                r = Record(source, number, raw)
                if None in raw or None in raw.values():
                    raise r.wrong(f"not as many values as there are columns ({len(reader.fieldnames)}).")
                yield r
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(
                f"{source.path}, after row {number}: no text in columns ({error}). Expected {expected}."
            ) from error
