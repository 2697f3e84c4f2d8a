"""Reading and writing: atomic files and folders, JSON, and errors that name the file, the line and the cure."""

import codecs
import errno
import html
import json
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from .errors import UserError, printable
from .locks import lock_open, remove_stale, sole_use

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_ACCESS = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EIO,
    errno.ESTALE,
}
# around the figures that an evaluation writes into a model card
CARD_BEGIN, CARD_END = "<!-- vlm-sft-rl eval: begin -->", "<!-- vlm-sft-rl eval: end -->"
UNFINISHED = ".unfinished"  # behind the names of what is being written, which begin with a dot
_SWEPT: set[str] = set()  # folders
# what torch and safetensors make of the system's error
_NO_ROOM_WORDS = (
    "No space left",
    "quota exceeded",
    "File too large",
    "file write failed",
    "inline_container",
    "iostream error",
)


# --- Writing ---


@contextmanager
def writing(path: str | Path, cure: str = "what was finished before is kept.") -> Iterator[None]:
    """Turn a full disk (or a folder without write permission) into one message, whichever library met it.

    Args:
        path: what is being written, for the message.
        cure: what giving the same command again will do.

    Raises UserError: in place of the library's error. Other errors pass.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_disk_full(error):
            reason, cure = "the disk is full", f"Free some space and give the same command again: {cure}"
        elif isinstance(error, OSError) and error.errno in NO_ACCESS:
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

    Raises UserError: there is something already (an empty folder is nothing), or nothing can be made there.
    """
    path = Path(path)
    if not path.name:
        raise UserError(f"{path}: has no name of its own. Name a folder that is to be made.")
    is_empty = path.is_dir() and not path.is_symlink() and not any(path.iterdir())
    if (path.exists() or path.is_symlink()) and not is_empty:
        raise UserError(f"{path}: exists already. Choose another target, or remove it first.")
    place = next(parent for parent in path.absolute().parents if parent.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise UserError(
            f"{path}: cannot be written to ({place} is no folder that can). Choose another target."
        )
    return path


def make_folder(path: str | Path) -> Path:
    """The folder, made where it is missing. Raises UserError: it cannot be made or written to."""
    path = Path(path)
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    return path


def give_user_mode(folder: str | Path) -> None:
    """Let the weights in a folder be read by whom the user's umask lets read: safetensors writes for the owner alone."""
    mask = os.umask(0o077)  # what another thread makes meanwhile is closed rather than open
    os.umask(mask)
    for path in Path(folder).glob("*.safetensors"):
        path.chmod(0o666 & ~mask)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder that appears under its name only when the block has ended without an error.

    Yields:
        A folder beside `path` to write into; removed when the block fails. What a killed run left there is thrown away.

    Raises UserError: `path` exists already, another process is writing it, or the disk is full.
    """
    path = require_absent(path)
    with sole_use(path, is_file=True):
        unfinished = path.with_name(f".{path.name}{UNFINISHED}")
        with writing(path):
            _sweep(path.parent)
            _remove(unfinished)
            unfinished.mkdir(parents=True)
            handle = os.open(unfinished, os.O_RDONLY)
        try:
            lock_open(handle)  # against `_sweep`
            with writing(path):
                yield unfinished
                os.replace(unfinished, require_absent(path))
        finally:
            os.close(handle)
            _remove(unfinished)


@contextmanager
def replacing(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """A file to write piece by piece; it replaces `path` when the block has ended without an error.

    Args:
        mode: "w" for UTF-8 text, "wb" for bytes.

    Raises UserError: the disk is full, or the folder cannot be written to, or `path` is a device, a pipe or a folder. The
    old file is left as it was.
    """
    path = Path(path)
    with writing(path):
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: exists and is no file. Choose another target.")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        with writing(path):
            make_folder(path.parent)
            _sweep(path.parent)
            # opened as any new file is, so that it gets the mode that the user's umask says
            with open(temporary, mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8") as handle:
                lock_open(handle.fileno())
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def _sweep(folder: Path) -> None:
    """Remove what killed runs left unfinished in a folder, once in a process. A living one holds a lock on its own."""
    if (key := str(folder.absolute())) in _SWEPT:
        return
    _SWEPT.add(key)
    remove_stale(folder)
    for path in folder.glob(f".*{UNFINISHED}"):
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            if lock_open(handle):
                _remove(path)
        finally:
            os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def rows_file(path: str | Path) -> Iterator[Callable[[dict], Any]]:
    """Yield a function that writes one row; the file appears as with `replacing`."""
    with replacing(path) as handle:
        yield lambda row: handle.write(_json_line(row))


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` to `path` so that a reader sees the old content or the new one, never a part."""
    with replacing(path) as handle:
        handle.write(text)
    return Path(path)


def write_json(path: str | Path, value: Any) -> Path:
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> Path:
    return write_text(path, "".join(map(_json_line, rows)))


def append_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Append whole lines and flush them to the disk, so that a killed run keeps what it had finished."""
    text = "".join(map(_json_line, rows))
    if not text:
        return
    path = Path(path)
    with writing(path, "it goes on after the last complete line."):
        make_folder(path.parent)
        with open(path, "a", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())


def as_markdown(text: str) -> str:
    """Text of a user (a name, a path) as a Markdown page shows it: one line, without HTML, links or cells of its own."""
    plain = html.escape("".join(c if c.isprintable() else " " for c in text), quote=False)
    return re.sub(r"([\\`*\[\]|])", r"\\\1", plain)


_ENCODE = json.JSONEncoder(ensure_ascii=False).encode  # `json.dumps` makes an encoder for every row


def _json_line(row: dict) -> str:
    return _ENCODE(row) + "\n"


@contextmanager
def row_progress(show: bool, what: str) -> Iterator[Callable[[], None]]:
    """Yield a function that counts one row on a progress bar on standard error."""
    if not show:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed} rows"),
    ]
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(printable(what), total=None)
        yield lambda: bar.advance(task)


# --- Reading ---


def require_file(path: str | Path) -> None:
    """Raises UserError: there is no file at that path."""
    if Path(path).is_dir():
        raise UserError(f"{path}: a folder, expected a file. Name the file in it.")
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file. Check the path.")


def open_file(path: str | Path, mode: str = "rb", **options: Any) -> IO:
    """`open`, whose error is a UserError."""
    try:
        return open(path, mode, **options)
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror}). Check the path.") from error


def read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file. Check the path.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}).") from error


def read_json(path: str | Path) -> Any:
    """The one value of a JSON file.

    Raises UserError: it cannot be read, is no JSON that we take (see `parse_json`), or an object has a key twice.
    """
    repeated: Counter = Counter()
    cure = "The file may be truncated: fetch it again."
    value = parse_json(read_text(path), path, cure=cure, decode=counting_decoder(repeated).decode)
    for key in repeated:
        raise UserError(f"{path}: the key {key!r} is given twice in one object. Remove one.")
    return value


def read_jsonl(path: str | Path, repeated: Counter | None = None) -> Iterator[tuple[int, dict]]:
    """Yield `(line_number, row)`, 1-based, skipping blank lines.

    Args:
        repeated: counts the keys that an object has twice (the last one counts, as everywhere). Looking for them takes
            longer than to parse, so only those do it who look at rows and make nothing of them.

    Raises UserError: a line is not a JSON object that we take (it is named), or the file cannot be read.
    """
    cure = (
        "A file of rows is a JSON array, or has one object a line; if this is its last line, it is truncated."
    )
    decode = json.loads if repeated is None else counting_decoder(repeated).decode
    with open_file(path) as handle:
        for number, line in enumerate(handle, 1):
            try:
                text = line.decode("utf-8" if number > 1 else "utf-8-sig")
            except UnicodeDecodeError as error:
                hint = what_else(line) if number == 1 else "Is this the right file?"
                raise UserError(f"{path}, line {number}: not UTF-8 text ({error.reason}). {hint}") from error
            if not text or text.isspace():
                continue
            if number == 1 and text[0] not in "{[":
                cure = what_else(line, cure)
            row = parse_json(text, path, number, cure, decode)
            if not isinstance(row, dict):
                raise UserError(
                    f"{path}, line {number}: expected one JSON object per line, found {type(row).__name__}."
                )
            yield number, row


# how files begin that are no JSON, and what to do with them
_OTHERS = (
    (b"\x1f\x8b", "It is compressed: unpack it with gunzip."),
    (b"PK\x03\x04", "It is a zip archive: unpack it."),
    (b"(\xb5\x2f\xfd", "It is compressed: unpack it with zstd."),
    (b"BZh", "It is compressed: unpack it with bunzip2."),
    (b"PAR1", "It is a parquet file: `vlm-sft-rl data convert --format hf` makes rows of it."),
    (
        b"version https://git-lfs",
        "It is the pointer of Git LFS and not the file: fetch that with `git lfs pull`.",
    ),
    (b"<", "It is a web page or XML: the download went wrong."),
    (codecs.BOM_UTF16_LE, "It is UTF-16: save it as UTF-8."),
    (codecs.BOM_UTF16_BE, "It is UTF-16: save it as UTF-8."),
)


def what_else(head: bytes, otherwise: str = "Is this the right file?") -> str:
    """What a file that begins like this is in place of JSON, with the cure."""
    return next((hint for start, hint in _OTHERS if head.startswith(start)), otherwise)


DEEPEST = 100  # lists and objects inside of one another
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_LONG_NUMBER = re.compile(r"\d{4300}")


def parse_json(
    text: str,
    path: str | Path,
    line: int | None = None,
    cure: str = "",
    decode: Callable[[str], Any] = json.loads,
) -> Any:
    """The value of a JSON text. NaN and infinite numbers are taken: whoever reads a number looks at it.

    Args:
        line: where in the file the text stands; None: it is the whole file.
        cure: what to do when it is no JSON.
        decode: the parser, `json.loads` or one that does more.

    Raises UserError: not JSON, or JSON that nobody could write on: half of a surrogate pair, a number of thousands of
    digits, or nesting deeper than `DEEPEST`.
    """
    try:
        value = decode(text)
    except json.JSONDecodeError as error:
        reason = f"not valid JSON ({error.msg} at column {error.colno}). {cure}"
        raise UserError(f"{path}, line {line or error.lineno}: {reason}".rstrip()) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {line or _line_of(_LONG_NUMBER, text)}: {unusable(error)}") from error
    if fault := json_fault(value, text, 0, len(text)):
        raise UserError(f"{path}, line {line or _line_of(_SURROGATE, text)}: {fault}")
    return value


def counting_decoder(repeated: Counter) -> json.JSONDecoder:
    """A decoder that counts the keys that an object has twice."""

    def pairs(items: list[tuple[str, Any]]) -> dict:
        value = dict(items)
        if len(value) < len(items):
            counts = Counter(key for key, _ in items)
            repeated.update(key for key, count in counts.items() if count > 1)
        return value

    return json.JSONDecoder(object_pairs_hook=pairs)


def _line_of(pattern: re.Pattern, text: str) -> int:
    match = pattern.search(text)
    return text.count("\n", 0, match.start() if match else 0) + 1


def unusable(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return f"JSON nested deeper than {DEEPEST} levels. Is this the right file?"
    return "a number of thousands of digits. Shorten it, or write it as text."


def json_fault(value: Any, text: str, start: int, end: int) -> str | None:
    """What is wrong with the value that stands in `text[start:end]` though it could be parsed.

    Every row of a file comes through here, so no character is looked at twice: deep values end in a row of brackets, and
    half a pair is written as an escape.
    """
    if not text[max(start, end - DEEPEST // 4) : end].strip("]} \t\n\r"):
        level = [value]
        for _ in range(DEEPEST + 1):
            level = [item for parent in level for item in _children(parent)]
            if not level:
                break
        else:
            return unusable(RecursionError())
    at = text.find("\\", start, end)
    while at >= 0:
        if _SURROGATE.match(text, at):
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                half = error.object[error.start]
                return f"half of a surrogate pair ({half!r}), which is no character. Correct the text."
            break
        at = text.find("\\", at + 2, end)
    return None


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
