"""Question files of our own schema."""

from collections.abc import Iterator

from ...data.sources.source import Source
from ...io import read_jsonl


def rows(source: Source) -> Iterator[tuple[str, dict]]:
    """JSONL of question rows, taken as they are."""
    for number, row in read_jsonl(source.path):
        yield f"{source.path}, line {number}", row
