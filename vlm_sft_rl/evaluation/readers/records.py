"""One record of an owner's file, and the kinds of files that they publish."""

import csv
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from ...data.rows import read_raw
from ...data.sources.conversations import read_records
from ...data.sources.questions import LETTERS
from ...data.sources.source import Source, take, take_text
from ...errors import FORMAT, RowError, UserError
from ...io import stream_json_arrays, stream_json_object


class Record(NamedTuple):
    """An entry of a file, and its number or key there. What it lacks is a RowError that names the place."""

    source: Source
    key: Any
    raw: dict

    @property
    def where(self) -> str:
        return self.source.at(self.key)

    def wrong(self, reason: str) -> RowError:
        return RowError(FORMAT, reason, self.where)

    def take(self, column: str, kind: type) -> Any:
        return take(self.raw, column, kind, self.where)

    def text(self, column: str) -> str:
        return take_text(self.raw, column, self.where)

    def texts(self, column: str) -> list[str]:
        return [str(item) for item in self.take(column, list)]

    def picture(self, column: str, folder: str = "") -> list[str]:
        return [self.source.image(folder, self.text(column))]

    def yes_no(self, column: str) -> str:
        answer = self.text(column).lower().rstrip(".")
        if answer not in ("yes", "no"):
            raise self.wrong(f"expected yes or no as the truth, found {self.text(column)!r:.80}.")
        return answer

    def people_answers(self, column: str = "answer") -> list[str]:
        """What people answered; a blank answer counts: nobody agrees with it."""
        return [take(item, column, str, self.where) for item in self.take("answers", list)]

    def letter(self, choices: list[str]) -> str:
        """The `answer`, which must be a letter of one of the choices."""
        letter, known = self.text("answer").strip("(). ").upper(), LETTERS[: len(choices)]
        if len(letter) != 1 or letter not in known:
            raise self.wrong(f"`answer`: expected a letter up to {known[-1]}, found {self.text('answer')!r}.")
        return letter

    def letter_at_index(self, choices: list[str]) -> str:
        """The letter of the choice whose index is the `answer`."""
        index = self.text("answer")
        if not index.isdigit() or int(index) >= len(choices):
            raise self.wrong(f"`answer`: expected an index below {len(choices)}, found {index!r}.")
        return LETTERS[int(index)]


def row(id: str, images: list[str], question: str, **fields: Any) -> dict:
    """A question row; fields that are None or empty text are left out."""
    known = {name: value for name, value in fields.items() if value not in (None, "")}
    return {"id": id, "images": images, "question": question, **known}


def objects(source: Source) -> Iterator[Record]:
    """A JSON list, or an object a line."""
    return (Record(source, number, raw) for number, raw in read_raw(source.path))


def members(source: Source) -> Iterator[Record]:
    """A JSON object of id -> question."""
    return (Record(source, identity, raw) for identity, raw in stream_json_object(source.path))


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
