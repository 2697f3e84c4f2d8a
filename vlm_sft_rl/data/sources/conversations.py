"""Conversations -> SFT rows."""

import hashlib
import io
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ...errors import FORMAT, UNREADABLE_IMAGE, RowError, UserError
from ...io import read_json
from ..rows import read_raw, sft_row, strip_none
from .boxes import rec_row
from .questions import LETTERS, answer_type
from .source import Source, take_text

STAGES = ("SUMMARY", "CAPTION", "REASONING", "CONCLUSION")
_STAGED = re.compile(r"\s*".join(f"<{stage}>.*?</{stage}>" for stage in STAGES), re.DOTALL)


def llava(source: Source) -> Iterator[dict]:
    """`{"id", "image"?, "conversations": [{"from", "value"}]}`: LLaVA, and REVERSE with `A_type` and `hint`."""
    yield from _rows(source, "llava", ("conversations",))


def trl(source: Source) -> Iterator[dict]:
    """`messages`, `prompt` and `completion`, or `question` and `answer`."""
    yield from _rows(source, "trl", ("messages", "prompt", "question"))


def llava_cot(source: Source) -> Iterator[dict]:
    """LLaVA-CoT-100k: LLaVA rows whose answers are `<SUMMARY>…<CAPTION>…<REASONING>…<CONCLUSION>…`, all pairs kept.

    An answer of another form is kept and counted.
    """
    for row in _rows(source, "llava_cot", ("conversations",)):
        answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        source.notes["answers without the four stages"] += sum(
            not _STAGED.fullmatch(answer.strip()) for answer in answers
        )
        yield row


def _rows(source: Source, name: str, fields: Collection[str]) -> Iterator[dict]:
    for number, raw in read_raw(source.path):
        if not any(raw.get(field) is not None for field in fields):
            raise RowError(
                FORMAT,
                f"no `{'`, `'.join(fields)}`, so this is not the format {name!r}. The row has {sorted(raw)}.",
                source.at(number),
            )
        row = sft_row(raw, source.at(number), source.notes)
        row["images"] = [source.image(item) if isinstance(item, str) else item for item in row["images"]]
        del row["source"]  # from now on the row's place is its line in the target
        yield row


# Records of parquet files and of `save_to_disk` folders, a batch at a time; images go into files.
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


# Files with any columns, JSONL or Hugging Face's: each record becomes the kind of row that its columns make.
def jsonl(source: Source) -> Iterator[dict]:
    """JSON or JSONL whose columns are ours, or are mapped to ours by `source.fields`."""
    for number, raw in read_raw(source.path):
        yield from _convert(raw, source, number)


def hf(source: Source) -> Iterator[dict]:
    """A parquet file, a folder of them, or a `save_to_disk` folder; images inside it are written to `images_dir`."""
    for number, raw in read_records(source):
        yield from _convert(strip_none(raw), source, number)


def _convert(raw: dict, source: Source, number: int) -> Iterator[dict]:
    where = source.at(number)
    raw = rename(raw, source.fields, where)
    if raw.get("box") is not None or raw.get("bbox") is not None:
        row = rec_row(raw, source, number)
        if row is not None:
            yield row
    elif (
        raw.get("conversations") is not None
        or raw.get("messages") is not None
        or raw.get("completion") is not None
    ):
        row = sft_row(raw, where, source.notes)
        row["images"] = [_path(item, source, where) for item in row["images"]]
        del row["source"]
        yield row
    elif raw.get("question") is not None:
        yield question_row(raw, source, number)
    else:
        raise RowError(
            FORMAT,
            f"the columns {sorted(raw)} make no row. Expected `messages`, `conversations`, `prompt` and `completion`, "
            "`question` and `answer`, or `image` and `box`. Name yours with --map, for example "
            "--map question=problem --map answer=solution.",
            where,
        )


def rename(raw: dict, fields: dict[str, str], where: str) -> dict:
    """The record with our names for its columns. Raises RowError where a mapped column is missing everywhere."""
    renamed = {name: value for name, value in raw.items() if name not in fields.values()}
    for ours, column in fields.items():
        if column in raw:
            renamed[ours] = raw[column]
        elif ours in ("question", "answer", "messages", "conversations", "box"):
            raise RowError(FORMAT, f"no column `{column}` (for `{ours}`). The row has {sorted(raw)}.", where)
    return renamed


def question_row(raw: dict, source: Source, number: int) -> dict:
    """A question row; columns that we do not know are kept as they are."""
    where = source.at(number)
    images = raw.get("images", raw.get("image"))
    images = [] if images is None else images if isinstance(images, list) else [images]
    identity = raw.get("id", raw.get("question_id", f"{source.path.stem}-{number}"))
    row: dict[str, Any] = {
        "id": str(identity),
        "images": [_path(item, source, where) for item in images],
        "question": take_text(raw, "question", where),
    }
    if raw.get("answer") is not None:
        answer, choices = raw["answer"], raw.get("choices")
        if isinstance(choices, list) and choices:
            if isinstance(answer, int) and 0 <= answer < min(len(choices), len(LETTERS)):
                answer = LETTERS[answer]  # an index, as ScienceQA has it
            row["answer"], row["answer_type"] = str(answer), "choice"
        elif isinstance(answer, str | int | float):
            row["answer"] = str(answer)
            row["answer_type"] = answer_type(row["answer"])
        else:
            raise RowError(FORMAT, f"field `answer`: expected text or a number, found {answer!r:.80}.", where)
    known = {"id", "image", "images", "question", "question_id", "answer"}
    return row | {name: value for name, value in raw.items() if name not in known}


def _path(item: Any, source: Source, where: str) -> str:
    if not isinstance(item, str) or not item.strip():
        raise RowError(FORMAT, f"field `images`: expected a path, found {item!r:.80}.", where)
    return source.image(item)
