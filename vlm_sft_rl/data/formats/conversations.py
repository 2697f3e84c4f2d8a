"""Conversations -> SFT rows."""

import re
from collections.abc import Collection, Iterator

from ..problems import FORMAT, RowError
from ..rows import read_raw, to_row
from .source import Source

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
        row = to_row(raw, source.at(number), source.notes)
        row["images"] = [source.image(item) if isinstance(item, str) else item for item in row["images"]]
        del row["source"]  # from now on the row's place is its line in the target
        yield row
