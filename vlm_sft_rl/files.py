"""Reading and writing of small text files: atomic writes, and errors that name the file and the line."""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .errors import UserError


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` to `path` so that a reader sees the old content or the new one, never a part.

    Raises:
        UserError: the disk is full, or the folder cannot be written to. The old file is left as it was.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as handle:
            temporary = handle.name
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        raise UserError(
            f"{path}: cannot write ({error.strerror or error}). Free some disk space or choose another "
            "folder, then run the same command again: what was finished before is kept."
        ) from error
    return path


def write_json(path: str | Path, value: Any) -> Path:
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> Path:
    return write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Append whole lines and flush them to the disk, so that a killed run keeps what it had finished."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not text:
        return
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise UserError(
            f"{path}: cannot append ({error.strerror or error}). Free some disk space, then run the same "
            "command again: it goes on after the last complete line."
        ) from error


def read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file. Check the path.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}).") from error


def read_json(path: str | Path) -> Any:
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}). The file may be "
            "truncated: compare its size with the source and fetch it again."
        ) from error


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict]]:
    """Yield `(line_number, row)`, 1-based, skipping blank lines.

    Raises:
        UserError: a line is not a JSON object (it is named), or the file cannot be read.
    """
    try:
        handle = open(path, encoding="utf-8")  # noqa: SIM115 - closed below, the error must be ours
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror}). Check the path.") from error
    with handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: not valid JSON ({error.msg}). If this is the last line, the file is "
                    "truncated: fetch or write it again."
                ) from error
            if not isinstance(row, dict):
                raise UserError(
                    f"{path}, line {number}: expected one JSON object per line, found {type(row).__name__}."
                )
            yield number, row
