"""JSONL files as the tests write and read them: by the standard library alone."""

import json
from collections.abc import Iterable
from pathlib import Path


def read_lines(path: Path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path: Path, rows: Iterable[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
