"""Reading JSON of any size, an element at a time: one array, the members of one object, or arrays inside it."""

import codecs
import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError

CHUNK = 1 << 20  # bytes read at a time
LARGEST_ELEMENT = 64 << 20  # characters; a longer "element" is a syntax error that swallowed the file
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
    decode = json.JSONDecoder().raw_decode
    window.next_character()
    while True:
        try:
            value, end = decode(window.text, window.at)
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
