"""Conversations, and files with any columns -> rows."""

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ...errors import UNREADABLE_IMAGE, RowError, UserError
from ...io import read_json
from ..images import store_image
from ..rows import sft_row, strip_none, wrong_field
from ..stages import STAGES
from .boxes import rec_rows
from .questions import answer_type
from .source import LETTERS, Record, Source, objects

_STAGED = re.compile(r"\s*".join(f"<{stage}>.*?</{stage}>" for stage in STAGES), re.DOTALL)
BATCH = 64  # records in memory; with pictures inside them that is some hundred megabytes


def llava(source: Source) -> Iterator[dict]:
    """`{"id", "image"?, "conversations": [{"from", "value"}]}`: LLaVA, and REVERSE with `A_type` and `hint`."""
    yield from _read(source, "llava", ("conversations",))


def trl(source: Source) -> Iterator[dict]:
    """`messages`, `prompt` and `completion`, or `question` and `answer`."""
    yield from _read(source, "trl", ("messages", "prompt", "question"))


def llava_cot(source: Source) -> Iterator[dict]:
    """LLaVA-CoT-100k: LLaVA rows whose answers are `<SUMMARY>…<CAPTION>…<REASONING>…<CONCLUSION>…`, all pairs kept.

    An answer of another form is kept and counted.
    """
    for row in _read(source, "llava_cot", ("conversations",)):
        answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        source.notes["answers without the four stages"] += sum(
            not _STAGED.fullmatch(answer.strip()) for answer in answers
        )
        yield row


def jsonl(source: Source) -> Iterator[dict]:
    """JSON or JSONL whose columns have our names, or are mapped to them by `source.fields`."""
    for r in objects(source):
        yield from _by_columns(r)


def hf(source: Source) -> Iterator[dict]:
    """A parquet file, a folder of them, or a `save_to_disk` folder; images inside it are written to `images_dir`."""
    for number, raw in read_records(source):
        yield from _by_columns(Record(source, number, strip_none(raw)))


def _read(source: Source, name: str, fields: Collection[str]) -> Iterator[dict]:
    for r in objects(source):
        if not any(r.raw.get(field) is not None for field in fields):
            raise r.wrong(
                f"no `{'`, `'.join(fields)}`, so this is not the format {name!r}. The row has {sorted(r.raw)}."
            )
        yield _conversation(r)


def _conversation(r: Record) -> dict:
    row = sft_row(r.raw, r.where, r.source.notes)
    row["images"] = [r.source.image(item) if isinstance(item, str) else item for item in row["images"]]
    del row["source"]  # from now on the row's place is its line in the target
    return row


def _by_columns(r: Record) -> Iterator[dict]:
    """The row, if any, of the kind that the record's columns make."""
    fields = r.source.fields
    raw = {name: value for name, value in r.raw.items() if name not in fields.values()}
    for name, column in fields.items():
        if column in r.raw:
            raw[name] = r.raw[column]
        elif name in ("question", "answer", "messages", "conversations", "box"):
            raise r.wrong(f"no column `{column}` (for `{name}`). The row has {sorted(r.raw)}.")
    columns, r = {name for name, value in raw.items() if value is not None}, r._replace(raw=raw)
    if columns & {"box", "bbox"}:
        yield from rec_rows(r)
    elif columns & {"conversations", "messages", "completion"}:
        yield _conversation(r)
    elif "question" in columns:
        yield _question(r)
    else:
        raise r.wrong(
            f"the columns {sorted(raw)} make no row. Expected `messages`, `conversations`, `prompt` and `completion`, "
            "`question` and `answer`, or `image` and `box`. Name yours with --map, for example "
            "--map question=problem --map answer=solution."
        )


def _question(r: Record) -> dict:
    """A question row; columns that we do not know are kept as they are."""
    raw = r.raw
    images = raw.get("images", raw.get("image"))
    images = [] if images is None else images if isinstance(images, list) else [images]
    for item in images:
        if not isinstance(item, str) or not item.strip():
            raise wrong_field("images", "a path", item, r.where)
    row: dict[str, Any] = {
        "id": str(raw.get("id", raw.get("question_id", r.number))),
        "images": [r.source.image(item) for item in images],
        "question": r.text("question"),
    }
    answer, choices = raw.get("answer"), raw.get("choices")
    if isinstance(choices, list) and choices and answer is not None:
        if isinstance(answer, int) and 0 <= answer < min(len(choices), len(LETTERS)):
            answer = LETTERS[answer]  # an index, as ScienceQA has it
        row |= {"answer": str(answer), "answer_type": "choice"}
    elif isinstance(answer, str | int | float):
        row |= {"answer": str(answer), "answer_type": answer_type(str(answer))}
    elif answer is not None:
        raise wrong_field("answer", "text or a number", answer, r.where)
    known = {"id", "image", "images", "question", "question_id", "answer"}
    return row | {name: value for name, value in raw.items() if name not in known}


# --- Parquet files and `save_to_disk` folders, a batch at a time; images go into files ---


def read_records(source: Source) -> Iterator[tuple[int, dict]]:
    """Yield `(number, record)`, 1-based; an image of a record is replaced by the path of its file.

    Raises:
        UserError: nothing of the kind is there, a file is damaged, or the folder has several splits and none is named.
    """
    number = 0
    for path in _data_files(source.path, source.split):
        try:
            for batch in _batches(path):
                for record in batch.to_pylist():
                    number += 1
                    yield number, _with_files(record, Record(source, number, record))
        except (pa.ArrowInvalid, pa.ArrowIOError, OSError) as error:
            raise UserError(
                f"{path}: damaged, or neither parquet nor Arrow ({error}). Fetch it again."
            ) from error


def _data_files(path: Path, split: str | None) -> list[Path]:
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
        cure = "Name one with --split" if split is None else f"There is no {split!r}"
        raise UserError(f"{path}: the folder has the splits {', '.join(splits) or 'none'}. {cure}.")
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


def _with_files(value: Any, r: Record) -> Any:
    """The value with every encoded image in it written to a file and replaced by its path."""
    if isinstance(value, list):
        return [_with_files(item, r) for item in value]
    if not isinstance(value, dict):
        return value
    if not value or not set(value) <= {"bytes", "path"}:
        return {name: _with_files(item, r) for name, item in value.items()}
    data, source = value.get("bytes"), r.source
    if data is None:
        return value.get("path")
    if source.images_dir is None:
        raise UserError(f"{r.where}: images come inside the file. Say where to write them: --images-dir.")
    if source.image_prefix:
        raise UserError(f"{r.where}: images come inside the file, so --image-prefix has no meaning.")
    try:
        path = store_image(data, source.images_dir)
    except UserError:
        raise
    except Exception as error:  # decoders raise many types on damaged files
        raise RowError(UNREADABLE_IMAGE, f"an image cannot be read ({error}).", r.where) from error
    return path.relative_to(source.images_base or source.images_dir).as_posix()
