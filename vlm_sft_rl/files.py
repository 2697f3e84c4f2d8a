"""Reading and writing: atomic files and folders, and errors that name the file, the line and the cure."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .errors import UserError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_ACCESS = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
}
# what torch and safetensors make of the system's error
_NO_ROOM_WORDS = (
    "No space left",
    "quota exceeded",
    "File too large",
    "file write failed",
    "inline_container",
    "iostream error",
)


@contextmanager
def writing(path: str | Path, cure: str = "what was finished before is kept.") -> Iterator[None]:
    """Turn a full disk (or a folder without write permission) into one message, whichever library met it.

    Args:
        path: what is being written, for the message.
        cure: what giving the same command again will do.

    Raises:
        UserError: in place of the library's error. Other errors pass.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_disk_full(error):
            reason, cure = "the disk is full", f"Free some space and give the same command again: {cure}"
        elif isinstance(error, OSError) and error.errno in _NO_ACCESS:
            reason, cure = f"cannot write ({error.strerror})", "Choose another folder."
        else:
            raise
        raise UserError(f"{path}: {reason}. {cure}") from error


def is_disk_full(error: BaseException) -> bool:
    """Whether this error, or one that it came from, is that there is no room left (disk, quota, file size limit)."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _NO_ROOM:
            return True
        if any(words in str(seen) for words in _NO_ROOM_WORDS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def require_absent(path: str | Path) -> Path:
    """`path`, which is to be made anew.

    Raises:
        UserError: there is something already (an empty folder is nothing).
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path}: exists already. Choose another target, or remove it first.")
    return path


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder that appears under its name only when the block has ended without an error.

    Yields:
        A folder beside `path` to write into; removed when the block fails. What a killed run left there is thrown away.

    Raises:
        UserError: `path` exists already, or the disk is full.
    """
    path = require_absent(path)
    unfinished = path.with_name(f".{path.name}.unfinished")
    with writing(path):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    try:
        with writing(path):
            yield unfinished
            os.replace(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def replacing(path: str | Path) -> Iterator[IO[str]]:
    """A text file to write piece by piece; it replaces `path` when the block has ended without an error.

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
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot write ({error.strerror or error}). Free some disk space or choose another "
            "folder, then run the same command again: what was finished before is kept."
        ) from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` to `path` so that a reader sees the old content or the new one, never a part.

    Raises:
        UserError: see `replacing`.
    """
    with replacing(path) as handle:
        handle.write(text)
    return Path(path)


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
        return Path(path).read_text(encoding="utf-8-sig")
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
        handle = open(path, encoding="utf-8-sig")  # noqa: SIM115 - closed below, the error must be ours
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror}). Check the path.") from error
    with handle:
        number = 0
        try:
            for number, line in enumerate(handle, 1):
                if line.strip():
                    yield number, _object(path, number, line)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}, after line {number}: not UTF-8 text ({error.reason}). Is this the right file?"
            ) from error


def _object(path: str | Path, number: int, line: str) -> dict:
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
    return row
