"""The question row of a record, and the kinds of files that owners publish besides JSON."""

import csv
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...data.sources.arrow import read_records
from ...data.sources.source import Record, Source
from ...errors import UserError
from ...io import stream_json_arrays


def row(id: str, images: list[str], question: str, **fields: Any) -> dict:
    """A question row; fields that are None or empty text are left out."""
    known = {name: value for name, value in fields.items() if value not in (None, "")}
    return {"id": id, "images": images, "question": question, **known}


def array(source: Source, name: str) -> Iterator[Record]:
    """The list of that name in a JSON object."""
    return (Record(source, number, raw) for _, number, raw in stream_json_arrays(source.path, (name,)))


def stored(source: Source, split: str | None) -> Iterator[Record]:
    """Parquet files with the pictures inside, which become paths; `split` says which of a folder."""
    return (Record(source, number, raw) for number, raw in read_records(replace(source, split=split)))


def table(source: Source, columns: tuple[str, ...], expected: str, delimiter: str = ",") -> Iterator[Record]:
    """Rows of a CSV file that has these columns; `expected` says which file that is."""
    with open(source.path, encoding="utf-8", newline="") as handle:
        reader = csv.DictReader(handle, delimiter=delimiter)
        for name in columns:
            if name not in (reader.fieldnames or ()):
                raise UserError(
                    f"{source.path}: no column {name!r}, found {reader.fieldnames}. Expected {expected}."
                )
        for number, raw in enumerate(reader, 1):
            yield Record(source, number, raw)
