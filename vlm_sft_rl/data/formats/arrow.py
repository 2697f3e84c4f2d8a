"""Records of parquet files and of `save_to_disk` folders, a batch at a time; images go into files."""

import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ...errors import UserError
from ...files import read_json
from ..problems import UNREADABLE_IMAGE, RowError
from .source import Source

BATCH = 64  # records in memory; with pictures inside them that is some hundred megabytes


def read_records(source: Source) -> Iterator[tuple[int, dict]]:
    """Yield `(number, record)`, 1-based; an image of a record is replaced by the path of its file.

    Raises:
        UserError: nothing of the kind is there, a file is damaged, or the folder has several splits and none is named.
    """
    number = 0
    for path in data_files(source.path, source.split):
        try:
            for batch in _batches(path):
                for record in batch.to_pylist():
                    number += 1
                    yield number, {name: _files(value, source, number) for name, value in record.items()}
        except (pa.ArrowInvalid, pa.ArrowIOError, OSError) as error:
            raise UserError(
                f"{path}: damaged, or neither parquet nor Arrow ({error}). Fetch it again."
            ) from error


def data_files(path: Path, split: str | None = None) -> list[Path]:
    """The files that a parquet file, a folder of them or a `save_to_disk` folder consists of, in order."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder. Check the path.")
    if (path / "dataset_dict.json").is_file():
        splits = read_json(path / "dataset_dict.json").get("splits", [])
        path = path / _choose(path, splits, split)
    if (path / "state.json").is_file():
        return [path / item["filename"] for item in read_json(path / "state.json")["_data_files"]]
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
    return files


def _choose(path: Path, splits: list[str], split: str | None) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split not in splits:
        asked = "Name one with --split" if split is None else f"There is no {split!r}"
        raise UserError(f"{path}: the folder has the splits {', '.join(splits) or 'none'}. {asked}.")
    return split


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=BATCH)
        return
    with pa.memory_map(str(path)) as mapped, pa.ipc.open_stream(mapped) as reader:
        for batch in reader:
            for start in range(0, batch.num_rows, BATCH):
                yield batch.slice(start, BATCH)


def _files(value: Any, source: Source, number: int) -> Any:
    """The value with every encoded image in it replaced by a path."""
    if isinstance(value, list):
        return [_files(item, source, number) for item in value]
    if isinstance(value, dict):
        if set(value) <= {"bytes", "path"} and value:
            return _write(value, source, number)
        return {name: _files(item, source, number) for name, item in value.items()}
    return value


def _write(image: dict, source: Source, number: int) -> str | None:
    data = image.get("bytes")
    if data is None:
        return image.get("path")
    if source.images_dir is None:
        raise UserError(
            f"{source.at(number)}: images come inside the file. Say where to write them: --images-dir."
        )
    if source.image_prefix:
        raise UserError(
            f"{source.at(number)}: images come inside the file, so --image-prefix has no meaning."
        )
    try:
        with Image.open(io.BytesIO(data)) as opened:
            suffix = {"JPEG": "jpg"}.get(opened.format, (opened.format or "img").lower())
    except Exception as error:  # decoders raise many types on damaged files
        raise RowError(UNREADABLE_IMAGE, f"an image cannot be read ({error}).", source.at(number)) from error
    # named by content: an image that many rows share is written once, and writing again changes nothing
    path = source.images_dir / f"{hashlib.sha256(data).hexdigest()[:20]}.{suffix}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_bytes(data)
        part.replace(path)
    return path.relative_to(source.images_base or source.images_dir).as_posix()
