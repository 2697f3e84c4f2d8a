"""Rows of a file of any size, read by number so that many processes can share it, and what each of them asks."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Protocol

from ..errors import FORMAT, RowError, UserError, first_line, short
from ..io import open_file, parse_json, row_progress, what_else
from .fields import check_numbers, identity_of, row_images, strip_none
from .messages import IMAGE, read_messages
from .rows import KNOWN, QUESTION, SFT, question_text

STEP = 1000  # rows between two places of a file that are remembered
EDGE = 1 << 16  # bytes of a parquet file's beginning and end, which has its figures
TRUTH = KNOWN[QUESTION] - KNOWN[SFT] - {"question"}  # what an answer can be graded by
TALKS = ("messages", "conversations", "prompt")
ASKS = ("question", *TALKS)


class NumberedRows(Protocol):
    """Rows with numbers from 0 on; processes hand them on pickled.

    Attributes:
        digest: changes when the rows do.
    """

    digest: str

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Iterator[tuple[str, dict]]:
        """`(file:number, row)` of the rows from `start` to below `stop`; that number is as people count, from 1 on."""
        ...


def open_rows(source: str, split: str | None = None, progress: bool = False) -> NumberedRows:
    """The rows of a JSONL file, a parquet file, a folder of those or of `save_to_disk`, or a data set of the Hub.

    Args:
        split: of a folder or a data set that has several.
        progress: show on standard error how far a JSONL file is counted.

    Raises UserError: there is nothing of the kind, it is damaged or has no rows, or a split is to be named.
    """
    path = Path(source)
    if path.is_dir() or path.suffix in (".parquet", ".arrow"):
        rows: NumberedRows = _arrow_rows(path, split)
    elif path.exists() or path.suffix:
        if split is not None:
            raise UserError(f"{path}: a JSONL file has no splits. Leave --split out.")
        rows = _line_rows(path, progress)
    else:
        table = _hub_table(source, split)
        rows = HubRows(source, split, len(table), table._fingerprint)
    if len(rows) == 0:
        raise UserError(f"{source}: no rows in it. Fetch or write it again.")
    return rows


# --- JSONL ---


@dataclass(frozen=True)
class LineRows:
    """A JSONL file; blank lines are no rows.

    Attributes:
        places: offset and line of every `STEP`th row.
    """

    path: Path
    count: int
    digest: str
    places: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return self.count

    def read(self, start: int, stop: int) -> Iterator[tuple[str, dict]]:
        """Raises UserError: a line is no JSON object."""
        offset, line = self.places[start // STEP]
        with open_file(self.path) as handle:
            handle.seek(offset)
            lines = ((number, text) for number, text in enumerate(handle, line) if text.strip())
            for number, text in islice(lines, start % STEP, start % STEP + stop - start):
                yield f"{self.path}:{number}", self._row(text, number)

    def _row(self, text: bytes, number: int) -> dict:
        try:
            decoded = text.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path}, line {number}: not UTF-8 text ({error.reason}). Is this the right file?"
            ) from error
        cure = "A JSONL file has one object a line; if this is its last line, it is truncated."
        row = parse_json(decoded, self.path, number, cure)
        if not isinstance(row, dict):
            raise UserError(
                f"{self.path}, line {number}: expected one JSON object per line, found {type(row).__name__}."
            )
        return row


def _line_rows(path: Path, progress: bool) -> LineRows:
    """Go through a JSONL file once, to know how many rows it has and where they are."""
    count, offset, places, content = 0, 0, [], hashlib.sha256()
    with open_file(path) as handle, row_progress(progress, f"counting {path.name}, thousands of") as advance:
        for number, text in enumerate(handle, 1):
            content.update(text)
            if text.strip():
                if count == 0:
                    _check_begin(path, text)
                if count % STEP == 0:
                    places.append((offset, number))
                    advance()
                count += 1
            offset += len(text)
    return LineRows(path, count, content.hexdigest()[:16], tuple(places))


def _check_begin(path: Path, text: bytes) -> None:
    """Raises UserError: a file that begins like this is no JSONL file."""
    begin = text.removeprefix(b"\xef\xbb\xbf").lstrip()
    if begin.startswith(b"["):
        raise UserError(
            f"{path}: a JSON array, which cannot be read by number. `vlm-sft-rl data convert` writes its rows as JSONL."
        )
    if not begin.startswith(b"{"):
        raise UserError(f"{path}: not a JSONL file, which has one JSON object a line. {what_else(begin)}")


# --- Parquet and Arrow ---


@dataclass(frozen=True)
class ArrowRows:
    """Parquet files, or those of `save_to_disk`, one behind the other.

    Attributes:
        counts: rows of each file.
    """

    paths: tuple[Path, ...]
    counts: tuple[int, ...]
    digest: str

    def __len__(self) -> int:
        return sum(self.counts)

    def read(self, start: int, stop: int) -> Iterator[tuple[str, dict]]:
        """Raises UserError: a file is damaged."""
        from .sources.arrow import read_slice

        for path, end, count in zip(self.paths, accumulate(self.counts), self.counts, strict=True):
            first = end - count
            if start < end and stop > first:
                low, high = max(start - first, 0), min(stop - first, count)
                for number, row in enumerate(
                    read_slice(path, low, high, {*KNOWN[SFT], *KNOWN[QUESTION]}), low + 1
                ):
                    yield f"{path}:{number}", row


def _arrow_rows(path: Path, split: str | None) -> ArrowRows:
    from .sources.arrow import data_files, row_count

    paths, content = data_files(path, split), hashlib.sha256()
    for file in paths:
        with open_file(file) as handle:
            size = handle.seek(0, os.SEEK_END)
            content.update(f"{file.name} {size}".encode())
            for place in (0, max(0, size - EDGE)):
                handle.seek(place)
                content.update(handle.read(EDGE))
    return ArrowRows(tuple(paths), tuple(map(row_count, paths)), content.hexdigest()[:16])


@dataclass(frozen=True)
class HubRows:
    """A data set by its name, from the Hub or its cache; each process maps it by itself."""

    name: str
    split: str | None
    count: int
    digest: str

    def __len__(self) -> int:
        return self.count

    def read(self, start: int, stop: int) -> Iterator[tuple[str, dict]]:
        table = _hub_table(self.name, self.split)
        names = [name for name in table.column_names if name in {*KNOWN[SFT], *KNOWN[QUESTION]}]
        rows = table.select_columns(names).with_format("arrow")  # pictures stay as they are stored
        for begin in range(start, stop, STEP):
            for number, row in enumerate(rows[begin : min(stop, begin + STEP)].to_pylist(), begin + 1):
                yield f"{self.name}:{number}", row


@cache
def _hub_table(name: str, split: str | None) -> Any:
    from datasets import DatasetDict, load_dataset

    try:
        table = load_dataset(name, split=split)
    except Exception as error:  # the library and the network raise many types
        raise UserError(
            f"{name}: no file, and no data set that can be loaded ({first_line(error)}). Check the path or the name."
        ) from error
    if isinstance(table, DatasetDict):
        if len(table) > 1:
            raise UserError(f"{name}: has the splits {', '.join(table)}. Name one with --split.")
        (table,) = table.values()
    return table


# --- What a row asks ---


def asked_row(raw: Mapping, where: str, prompt: str | None = None) -> dict:
    """`{"id", "images", "question"}` of any row, and the ground truth that it has (the fields `TRUTH`).

    What is asked is the question with its unit and choices, or the one user turn before the first answer of a conversation.

    Args:
        where: `file:number`, for errors and as the id of a row that has none.
        prompt: asked of every row in place of that.

    Raises RowError: a row that asks nothing or has several turns, marks that do not match its images, or a field that cannot
    be used.
    """
    raw = strip_none(dict(raw))
    images = row_images(raw, where)
    truth = {name: raw[name] for name in sorted(TRUTH & raw.keys())}
    try:
        truth = json.loads(json.dumps(truth, default=_as_text))
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(FORMAT, f"ground truth that JSON cannot hold ({first_line(error)}).", where) from error
    check_numbers(truth, where)
    text = prompt
    if text is None:
        text, images = _question(raw, images, where)
    if not text.strip():
        raise RowError(FORMAT, "nothing is asked: the text is empty.", where)
    if (marks := text.count(IMAGE)) not in (0, len(images)):
        raise RowError(FORMAT, f"{marks} {IMAGE} marks in what is asked, and {len(images)} images.", where)
    return {"id": identity_of(raw, where), "images": images, "question": text, **truth}


def _question(raw: dict, images: list, where: str) -> tuple[str, list]:
    """The text that a row asks, and its pictures, which may stand in its messages."""
    fields = [name for name in ASKS if raw.get(name) is not None]
    if not fields:
        names = ", ".join(f"`{name}`" for name in ASKS)
        raise RowError(
            FORMAT,
            f"none of the fields {names}, so nothing is asked (it has {short(sorted(map(str, raw)), 200)}). Ask the same of "
            "every row with --prompt.",
            where,
        )
    field = fields[0]
    if field == "question":
        if not isinstance(raw[field], str):
            raise RowError(FORMAT, f"field `question`: expected text, found {short(raw[field])}.", where)
        return question_text(raw), images
    role = "user" if field == "prompt" else None
    messages, images = read_messages(raw, [(field, raw[field], role)], images, where, None)
    answers = (i for i, message in enumerate(messages) if message["role"] == "assistant")
    asked = messages[: next(answers, None)]
    if [message["role"] for message in asked] != ["user"]:
        roles = ", ".join(message["role"] for message in asked) or "none"
        raise RowError(
            FORMAT,
            f"field `{field}`: expected one user turn before the first answer, found the turns: {roles}. Decoders take one "
            "question without a system turn.",
            where,
        )
    return asked[0]["content"], images


def _as_text(value: Any) -> str:
    """Dates, decimals and the like, which a parquet file may hold."""
    if isinstance(value, bytes):
        raise TypeError("bytes")
    return str(value)
