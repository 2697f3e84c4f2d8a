"""Files with any columns, JSONL or Hugging Face's: each record becomes the kind of row that its columns make."""

from collections.abc import Iterator
from typing import Any

from ..problems import FORMAT, RowError
from ..rows import read_raw, strip_none, to_row
from .arrow import read_records
from .questions import LETTERS, answer_type
from .referring import rec_row
from .source import Source, take_text


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
        row = to_row(raw, where, source.notes)
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
