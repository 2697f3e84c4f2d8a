"""Reading and writing: atomic files and folders, and errors that name the file, the line and the cure."""

import codecs
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

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


# Writing a JSONL file of any length so that it appears when it is complete.
@contextmanager
def rows_file(target: str | Path) -> Iterator[Callable[[dict], None]]:
    """Yield a function that writes one row; `target` is replaced when the block ends without an error.

    Raises:
        UserError: the disk is full, or the folder cannot be written to. The old file is left as it was.
    """
    target, temporary = Path(target), None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=target.parent, prefix=f".{target.name}.", delete=False
        ) as out:
            temporary = Path(out.name)
            yield lambda row: out.write(json.dumps(row, ensure_ascii=False) + "\n") and None
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(
            f"{target}: cannot write ({error.strerror or error}). Free some disk space."
        ) from error
    finally:
        if temporary is not None and temporary.exists():
            temporary.unlink()


@contextmanager
def row_progress(show: bool, what: str) -> Iterator[Callable[[], None]]:
    """Yield a function that counts one row on a progress bar on standard error."""
    if not show:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} rows")]
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda: bar.advance(task)


# Reading JSON of any size, an element at a time: one array, the members of one object, or arrays inside it.
CHUNK = 1 << 20  # bytes read at a time
LARGEST_ELEMENT = 64 << 20  # characters; a longer "element" is a syntax error that swallowed the file
_DECODE = json.JSONDecoder().raw_decode
_OPEN_NUMBER = re.compile(r"[-+.eE\d]*\Z")
_BLANK = re.compile(r"[ \t\n\r]*")


class _Window:
    """A sliding window of decoded text over a binary file that knows its byte offset."""

    def __init__(self, handle: BinaryIO, path: Path):
        self.handle, self.path = handle, path
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.offset, self.finished = "", 0, 0, False

    def byte_offset(self) -> int:
        return self.offset + len(self.text[: self.at].encode())

    def more(self) -> bool:
        """Forget what was consumed and read another chunk; False at the end of the file."""
        if self.finished:
            return False
        self.offset += len(self.text[: self.at].encode())
        chunk = self.handle.read(CHUNK)
        self.finished = not chunk
        try:
            fresh = self.decoder.decode(chunk, final=self.finished)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path}: not UTF-8 text near byte {self.offset}: {error.reason}. The file is damaged "
                "or truncated, or it is not JSON: fetch it again."
            ) from error
        self.text, self.at = self.text[self.at :] + fresh, 0
        return not self.finished

    def next_character(self) -> str:
        """The next non-blank character without consuming it, or an empty string at the end of the file."""
        while True:
            if self.at < len(self.text) and self.text[self.at] not in " \t\n\r":
                return self.text[self.at]
            self.at = _BLANK.match(self.text, self.at).end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""


def stream_json_array(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yield `(number, element)` of a JSON array, 1-based. Memory is that of one element and one chunk.

    Raises:
        UserError: the file cannot be read, is not a JSON array, or ends too soon; the byte offset of the last
            complete element is named.
    """
    with _open(path) as window:
        if window.next_character() != "[":
            raise UserError(f"{window.path}: expected a JSON array (`[` first). Is this the right file?")
        yield from _array(window)
        _expect_end(window, "array")


def stream_json_object(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Yield `(key, value)` of a JSON object. Memory is that of one value and one chunk.

    Raises:
        UserError: as `stream_json_array`, for an object.
    """
    with _open(path) as window:
        for number, key in enumerate(_keys(window), 1):
            yield key, _element(window, number)


def stream_json_arrays(path: str | Path, keys: Collection[str]) -> Iterator[tuple[str, int, Any]]:
    """Yield `(key, number, element)` of the arrays that a JSON object holds under `keys`, in the file's order.

    Memory is that of one element and one chunk; what stands under other keys is read past.

    Raises:
        UserError: as `stream_json_array`; or a key is not there, or does not hold an array.
    """
    missing = dict.fromkeys(keys)
    with _open(path) as window:
        for number, key in enumerate(_keys(window), 1):
            is_array = window.next_character() == "["
            if key in missing:
                if not is_array:
                    raise _broken(window, number - 1, f"expected an array under `{key}`")
                del missing[key]
            if not is_array:
                _element(window, number)
                continue
            for count, element in _array(window):
                if key in keys:
                    yield key, count, element
    if missing:
        raise UserError(
            f"{path}: no `{'`, no `'.join(missing)}` in the file. Is it of this format, and complete?"
        )


@contextmanager
def _open(path: str | Path) -> Iterator[_Window]:
    try:
        handle = open(path, "rb")  # noqa: SIM115 - the error must be ours
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror}). Check the path.") from error
    with handle:
        yield _Window(handle, Path(path))


def _array(window: _Window) -> Iterator[tuple[int, Any]]:
    """The elements of the array that begins here; afterwards the window stands behind it."""
    window.next_character()
    window.at += 1
    number = 0
    while _next_item(window, number, "]"):
        number += 1
        yield number, _element(window, number)


def _keys(window: _Window) -> Iterator[str]:
    """The keys of the object that the file is; at each the window stands before its value."""
    if window.next_character() != "{":
        raise UserError(f"{window.path}: expected a JSON object (`{{` first). Is this the right file?")
    window.at += 1
    number = 0
    while _next_item(window, number, "}"):
        number += 1
        key = _element(window, number)
        if not isinstance(key, str) or (character := window.next_character()) != ":":
            if isinstance(key, str) and not character:
                raise _truncated(window, number - 1)
            raise _broken(window, number - 1, f"expected a key and `:`, found {key!r:.80}")
        window.at += 1
        yield key
    _expect_end(window, "object")


def _next_item(window: _Window, number: int, end: str) -> bool:
    """Move to the next item of an array or object that had `number` so far; False behind its end."""
    character = window.next_character()
    if character == end:
        window.at += 1
        return False
    if number and character:
        if character != ",":
            raise _broken(window, number, f"expected `,` or `{end}`, found {character!r}")
        window.at += 1
        character = window.next_character()
    if not character:
        raise _truncated(window, number)
    return True


def _expect_end(window: _Window, what: str) -> None:
    if extra := window.next_character():
        raise UserError(
            f"{window.path}: text after the end of the {what} ({extra!r} at byte {window.byte_offset()}). Correct the "
            "file there, or fetch it again."
        )


def _element(window: _Window, number: int) -> Any:
    window.next_character()
    while True:
        try:
            value, end = _DECODE(window.text, window.at)
            # a number at the end of the chunk may go on in the next
            if (
                not _OPEN_NUMBER.match(window.text, end)
                or not isinstance(value, int | float)
                or window.finished
            ):
                window.at = end
                return value
            window.more()
        except json.JSONDecodeError as error:
            # an incomplete element fails where the text ends, or inside a string that the text does not close
            incomplete = error.pos >= len(window.text) - 8 or error.msg.startswith("Unterminated string")
            if not incomplete or len(window.text) - window.at > LARGEST_ELEMENT:
                raise _broken(window, number - 1, error.msg) from error
            if not window.more():
                raise _truncated(window, number - 1) from error


def _truncated(window: _Window, complete: int) -> UserError:
    return UserError(
        f"{window.path}: the JSON ends too soon: {complete} complete elements, then nothing valid "
        f"after byte {window.byte_offset()}. The file is truncated: compare its size with the source and "
        "fetch it again."
    )


def _broken(window: _Window, complete: int, what: str) -> UserError:
    return UserError(
        f"{window.path}: not valid JSON near byte {window.byte_offset()}, after element {complete}: {what}. "
        "Correct the file there, or fetch it again."
    )
