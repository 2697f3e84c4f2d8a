"""Reading one JSON array of any size, an element at a time."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError

CHUNK = 1 << 20  # bytes read at a time
LARGEST_ELEMENT = 64 << 20  # characters; a longer "element" is a syntax error that swallowed the file
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
                f"{self.path}: not UTF-8 text near byte {self.offset}: {error.reason}. The file is damaged or "
                "truncated, or it is not JSON: fetch it again."
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
    path = Path(path)
    try:
        handle = open(path, "rb")  # noqa: SIM115 - the error must be ours
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror}). Check the path.") from error
    with handle:
        window = _Window(handle, path)
        if window.next_character() != "[":
            raise UserError(f"{path}: expected a JSON array (`[` first). Is this the right file?")
        window.at += 1
        number = 0
        while (character := window.next_character()) != "]" or number == 0:
            if character == "]":
                break
            if number and character:
                if character != ",":
                    raise _broken(window, number, f"expected `,` or `]`, found {character!r}")
                window.at += 1
                character = window.next_character()
            if not character:
                raise _truncated(window, number)
            number += 1
            yield number, _element(window, number)
        window.at += 1
        if extra := window.next_character():
            raise _broken(window, number, f"text after the end of the array ({extra!r})")


def _element(window: _Window, number: int) -> Any:
    decode = json.JSONDecoder().raw_decode
    while True:
        try:
            value, window.at = decode(window.text, window.at)
            return value
        except json.JSONDecodeError as error:
            # an incomplete element fails where the text ends, or inside a string that the text does not close
            incomplete = error.pos >= len(window.text) - 8 or error.msg.startswith("Unterminated string")
            if not incomplete or len(window.text) - window.at > LARGEST_ELEMENT:
                raise _broken(window, number - 1, error.msg) from error
            if not window.more():
                raise _truncated(window, number - 1) from error


def _truncated(window: _Window, complete: int) -> UserError:
    return UserError(
        f"{window.path}: the JSON array ends too soon: {complete} complete elements, then nothing valid after byte "
        f"{window.byte_offset()}. The file is truncated: compare its size with the source and fetch it again."
    )


def _broken(window: _Window, complete: int, what: str) -> UserError:
    return UserError(
        f"{window.path}: not valid JSON near byte {window.byte_offset()}, after element {complete}: {what}. "
        "Correct the file there, or fetch it again."
    )
