"""Conversations, and files with any columns -> rows."""

import re
from collections.abc import Collection, Iterable, Iterator

from ...errors import UserError, short
from ..fields import either, strip_none
from ..rows import PREFERENCE, QUESTION, REGION, preference_row, question_row, row_kind, sft_row
from ..stages import STAGES
from .arrow import read_records
from .boxes import rec_rows
from .questions import answer_type
from .source import Record, Source, objects, picture_path

_STAGED = re.compile(r"\s*".join(f"<{stage}>.*?</{stage}>" for stage in STAGES), re.DOTALL)


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
    return _by_columns(source, objects(source))


def hf(source: Source) -> Iterator[dict]:
    """A parquet file, a folder of them, or a `save_to_disk` folder; images inside it are written to `images_dir`."""
    return _by_columns(source, (Record(source, n, strip_none(raw)) for n, raw in read_records(source)))


def _read(source: Source, name: str, fields: Collection[str]) -> Iterator[dict]:
    for r in objects(source):
        if not any(r.raw.get(field) is not None for field in fields):
            raise r.wrong(
                f"no `{'`, `'.join(fields)}`, so this is not the format {name!r}. The row has {short(sorted(r.raw), 300)}."
            )
        yield _conversation(r)


def _conversation(r: Record) -> dict:
    row = sft_row(r.raw, r.where, r.source.notes)
    del row["source"]  # from now on the row's place is its line in the target
    return _with_paths(r, row)


def _with_paths(r: Record, row: dict) -> dict:
    return row | {"images": [picture_path(r, item) for item in row["images"]]}


def _by_columns(source: Source, records: Iterable[Record]) -> Iterator[dict]:
    """The rows of the kinds that the records' columns make; one with a box that is mapped to `box` is a region."""
    boxes, unseen, record = source.boxes(), set(source.fields.values()), None
    for record in records:
        unseen -= record.checked().raw.keys()
        r = _renamed(record)
        kind = row_kind(r.raw | {"box": either(r.raw, "box", "bbox", r.where)})
        if kind == REGION or "box" in source.fields:
            yield from rec_rows(r, boxes)
        elif kind == QUESTION:
            yield _question(r)
        elif kind == PREFERENCE:
            yield _with_paths(r, preference_row(r.raw, r.where, source.notes))
        elif any(r.raw.get(name) is not None for name in ("conversations", "messages", "completion")):
            yield _conversation(r)
        else:
            raise r.wrong(
                f"the columns {short(sorted(r.raw), 300)} make no row. Expected `messages`, `conversations`, `prompt` and "
                "`completion`, `question` and `answer`, or `image` and `box`. Name yours with --map, for example "
                "--map question=problem --map answer=solution."
            )
    boxes.check()
    if unseen and record is not None:
        names = ", ".join(map(repr, sorted(unseen)))
        raise UserError(f"{source.path}: --map names columns that no row has: {names:.200}. Correct it.")


def _renamed(r: Record) -> Record:
    """The record with its columns under our names."""
    fields = r.source.fields
    raw = {name: value for name, value in r.raw.items() if name not in fields.values()}
    for name, column in fields.items():
        if column in r.raw:
            raw[name] = r.raw[column]
        elif name in ("question", "answer", "messages", "conversations", "box"):
            raise r.wrong(f"no column `{column}` (for `{name}`). The row has {short(sorted(r.raw), 300)}.")
    return r._replace(raw=raw)


def _question(r: Record) -> dict:
    """A question row; columns that we do not know are kept as they are."""
    raw = {name: value for name, value in r.raw.items() if value is not None}
    answer, choices = raw.get("answer"), raw.pop("choices", None)
    if isinstance(answer, list) and {"box", "bbox"} & set(raw):
        raise r.wrong("an answer of several texts beside a box: for region rows say so, --map box=bbox.")
    if choices not in (None, [], ""):
        raw["choices"] = [text.strip() for text in r.texts("choices")]
        if answer is not None:
            raw["answer"] = r.letter_meant(raw["choices"])
            raw.setdefault("answer_type", "choice")
    elif answer is not None:
        raw["answer"] = r.text("answer")
        raw.setdefault("answer_type", answer_type(raw["answer"]))
    needed = {"id", "question_id", "image", "images", "question", "answer"}
    for name in [name for name, value in raw.items() if value != value and name not in needed]:  # NaN
        del raw[name]
        r.source.notes[f"column {short(name)} left out where it is NaN"] += 1
    raw["question"] = r.text("question")
    row = _with_paths(r, question_row(raw, r.where))
    row.pop("question_id", None)
    return row
