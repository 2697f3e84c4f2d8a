"""Parquet files and `save_to_disk` folders, a batch at a time; images that come inside them go into files."""

import datetime
import decimal
import json
import re
import uuid
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ...errors import RowError, UserError, first_line, short
from ...io import open_file, read_json
from .source import Record, Source, picture_path

BATCH = 64  # records in memory; with pictures inside them that is some hundred megabytes
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def read_records(source: Source) -> Iterator[tuple[int, dict]]:
    """Yield `(number, record)`, 1-based; an image of a record is replaced by the path of its file.

    Raises:
        UserError: nothing of the kind is there, a file is damaged or lies outside of the folder, or the folder has
            several splits and none is named.
        RowError: a picture that cannot be read, or a value that JSON cannot hold.
    """
    number = 0
    for path in data_files(source.path, source.split):
        with _reading(path):
            for batch in _batches(path):
                for raw in _records(batch):
                    number += 1
                    record = Record(source, number, raw)
                    yield number, {str(name): _plain(value, record, name) for name, value in raw.items()}


def _records(batch: pa.RecordBatch) -> Iterator[dict]:
    batch.validate(full=True)
    labels = _class_labels(batch.schema)
    for raw in batch.to_pylist():
        yield raw | {name: _label(raw[name], names) for name, names in labels.items()}


def data_files(path: Path, split: str | None) -> list[Path]:
    """The files that a parquet file, a folder of them or a `save_to_disk` folder consists of, in order."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder. Check the path.")
    folder = path
    if (path / "dataset_dict.json").is_file():
        splits = _entries(path / "dataset_dict.json", "splits", str)
        name = _choose(path, splits, split)
        if name in ("", ".", "..") or re.search(r"[/\\]", name):  # the folder is searched
            raise UserError(
                f"{folder}: the split {short(name, 200)} lies outside of it. Nothing there is read."
            )
        path = path / name
    if (path / "state.json").is_file():
        entries = _entries(path / "state.json", "_data_files", dict)
        files = [path / str(entry.get("filename")) for entry in entries]
    else:
        files = sorted(path.rglob("*.parquet"))
        splits = sorted({file.name.split("-")[0] if "-" in file.name else file.stem for file in files})
        if len(splits) > 1 or split is not None:
            chosen = _choose(path, splits, split)
            files = [f for f in files if f.stem == chosen or f.name.startswith(f"{chosen}-")]
    if not files:
        raise UserError(
            f"{path}: no parquet files and no `state.json` here. Give a parquet file, a folder of them, or the folder "
            "that `save_to_disk` wrote."
        )
    for file in files:
        _require_inside(file, folder)
    return files


def _entries(path: Path, key: str, kind: type) -> list:
    """The list under a key of a JSON file of the `datasets` library."""
    value = read_json(path)
    entries = value.get(key) if isinstance(value, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, kind) for entry in entries):
        raise UserError(f"{path}: no list `{key}`. Is this a folder that `save_to_disk` wrote?")
    return entries


def _require_inside(file: Path, folder: Path) -> None:
    """Raises UserError: the file is none, or lies outside of the folder or of the cache that the folder is a snapshot of."""
    roots = [folder.resolve()]
    # the cache of the Hugging Face hub: snapshots/<revision> holds links into blobs
    roots += [parent.parent / "blobs" for parent in roots[0].parents if parent.name == "snapshots"]
    try:
        resolved = file.resolve()
        is_inside, is_file = any(resolved.is_relative_to(root) for root in roots), resolved.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{folder}: names the file {short(str(file), 200)}, which is no usable path."
        ) from error
    if not is_inside:
        raise UserError(
            f"{folder}: names the file {short(str(file), 200)}, which lies outside of it. Nothing there is read."
        )
    if not is_file:
        raise UserError(
            f"{folder}: names the file {short(str(file), 200)}, which is not there. Is the folder complete?"
        )


def _choose(path: Path, splits: list[str], split: str | None) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split not in splits:
        cure = "Name one with --split" if split is None else f"There is no {split!r}"
        raise UserError(f"{path}: the folder has the splits {', '.join(splits) or 'none'}. {cure}.")
    return split


def row_count(path: Path) -> int:
    """Rows of a parquet or an Arrow file, without its pictures. Raises UserError: it is damaged."""
    with _reading(path):
        if _is_parquet(path):
            return pq.read_metadata(path).num_rows
        return sum(batch.num_rows for batch in _batches(path))


def read_slice(path: Path, start: int, stop: int, columns: set[str]) -> Iterator[dict]:
    """The records from number `start` (the first is 0) to below `stop`, with those of `columns` that there are.

    Pictures stay as they are stored.

    Raises UserError: the file is damaged.
    """
    with _reading(path):
        end = start  # number of the record behind the batch
        for batch in _batches(path, start, columns):
            yield from _records(batch.slice(0, stop - end))
            end += batch.num_rows
            if end >= stop:
                return


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: damaged, or neither parquet nor Arrow ({first_line(error)}). Fetch it again."
        ) from error


def _is_parquet(path: Path) -> bool:
    with open_file(path) as handle:
        return handle.read(4) == b"PAR1" or path.suffix == ".parquet"


def _batches(path: Path, start: int = 0, columns: set[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The records from number `start` on; row groups of parquet that lie before it are not read."""
    if _is_parquet(path):
        with pq.ParquetFile(path) as file:
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            ends = list(accumulate(sizes))
            first = bisect_right(ends, start)
            start -= ends[first - 1] if first else 0
            names = columns and [name for name in file.schema_arrow.names if name in columns]
            groups = range(first, len(sizes))
            yield from _from(start, file.iter_batches(batch_size=BATCH, row_groups=groups, columns=names))
        return
    with open_file(path) as handle:
        handle.seek(max(0, path.stat().st_size - len(_END_OF_STREAM)))
        is_whole = handle.read() == _END_OF_STREAM
    with pa.memory_map(str(path)) as mapped, pa.ipc.open_stream(mapped) as reader:
        if not is_whole:  # one that is cut between two batches reads as if it were whole
            raise pa.ArrowInvalid("the stream has no end")
        names = columns and [name for name in reader.schema.names if name in columns]
        parts = (batch.select(names) if columns else batch for batch in reader)
        pieces = (part.slice(i, BATCH) for part in parts for i in range(0, part.num_rows, BATCH))
        yield from _from(start, pieces)


def _from(start: int, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        if start < batch.num_rows:
            yield batch.slice(start)
        start = max(0, start - batch.num_rows)


def _class_labels(schema: pa.Schema) -> dict[str, list]:
    """The names of the classes of each column of `datasets.ClassLabel`, which holds their numbers."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        labels = {name: f["names"] for name, f in features.items() if f.get("_type") == "ClassLabel"}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}
    return {name: names for name, names in labels.items() if name in schema.names and isinstance(names, list)}


def _label(value: Any, names: list) -> Any:
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def _plain(value: Any, r: Record, column: str) -> Any:
    """The value as JSON can hold it; an encoded image in it is written to a file and replaced by its path."""
    if isinstance(value, list | tuple):
        return [_plain(item, r, column) for item in value]
    if isinstance(value, dict) and value and set(value) <= {"bytes", "path"}:
        return value.get("path") if value.get("bytes") is None else picture_path(r, value)
    if isinstance(value, dict):
        return {str(name): _plain(item, r, column) for name, item in value.items()}
    if isinstance(value, bytes):
        try:
            return picture_path(r, value)
        except RowError as error:
            reason = f"column {short(column)} holds bytes that are no picture. Leave it out of the file."
            raise RowError(error.kind, reason, r.where) from error
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta | uuid.UUID):
        return str(value)
    return value
