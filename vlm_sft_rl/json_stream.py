"""JSON of any size, an element at a time."""

import codecs
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from .errors import UserError, short
from .io import counting_decoder, json_fault, open_file, unusable, what_else

# Not by ijson: it takes 1.3 times as long for an array and 3 times for several arrays of an object, and refuses integers
# above 64 bits, NaN and Infinity.
CHUNK = 1 << 20  # bytes read at a time
LARGEST_ELEMENT = 64 << 20  # characters; a longer "element" is a syntax error that swallowed the file
_DECODE = json.JSONDecoder().raw_decode
_OPEN_NUMBER = re.compile(r"[-+.eE\d]*\Z")
_OPEN_WORD = re.compile(r"[-+.\\\w]*\s*\Z")  # a number, name or escape that the file does not end
_BLANK = re.compile(r"[ \t\n\r]*")


def stream_json_array(path: str | Path, repeated: Counter | None = None) -> Iterator[tuple[int, Any]]:
    """Yield `(number, element)` of a JSON array, 1-based. Memory is that of one element and one chunk.

    Args:
        repeated: see `read_jsonl`.

    Raises UserError: the file cannot be read, is not a JSON array, or ends too soon; the byte offset of the last
    complete element is named.
    """
    with _json_text(path, "[", "array") as text:
        if repeated is not None:
            text.decode = counting_decoder(repeated).raw_decode
        for number in text.items("]"):
            yield number, text.element()


def stream_json_object(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Yield `(key, value)` of a JSON object. Memory is that of one value and one chunk.

    Raises UserError: as `stream_json_array`, for an object.
    """
    with _json_text(path, "{", "object") as text:
        for key in text.members():
            yield key, text.element()


def stream_json_arrays(path: str | Path, keys: Collection[str]) -> Iterator[tuple[str, int, Any]]:
    """Yield `(key, number, element)` of the arrays that a JSON object holds under `keys`, in the file's order.

    Memory is that of one element and one chunk; what stands under other keys is read past.

    Raises UserError: as `stream_json_array`; or a key is not there, or does not hold an array.
    """
    missing = dict.fromkeys(keys)
    with _json_text(path, "{", "object") as text:
        for key in text.members():
            is_array = text.peek() == "["
            if key in missing and not is_array:
                raise text.broken(f"expected an array under `{key}`")
            missing.pop(key, None)
            if not is_array:
                text.element()
                continue
            for number in text.items("]"):
                element = text.element()
                if key in keys:
                    yield key, number, element
    if missing:
        raise UserError(
            f"{path}: no `{'`, no `'.join(missing)}` in the file. Is it of this format, and complete?"
        )


@contextmanager
def _json_text(path: str | Path, opening: str, what: str) -> Iterator["_JsonText"]:
    with open_file(path) as handle:
        text = _JsonText(handle, Path(path))
        if text.peek() != opening:
            raise UserError(f"{path}: expected a JSON {what} (`{opening}` first). {what_else(text.head)}")
        yield text
        if extra := text.peek():
            raise UserError(
                f"{path}: text after the end of the {what} ({extra!r} at byte {text.byte_offset()}). Correct the file "
                "there, or fetch it again."
            )


class _JsonText:
    """JSON that is read a chunk at a time: `text[at:]` is what of it was read and not taken yet."""

    def __init__(self, handle: BufferedReader, path: Path):
        self.handle, self.path, self.decode = handle, path, _DECODE
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.ended, self.head = "", 0, False, handle.peek(100)
        self.offset = 0  # bytes before `text`
        self.complete = 0  # elements taken of the array or object at hand

    def byte_offset(self) -> int:
        return self.offset + len(self.text[: self.at].encode())

    def more(self) -> bool:
        """Forget what was taken and read another chunk; False at the end of the file."""
        if self.ended:
            return False
        self.offset = self.byte_offset()
        chunk = self.handle.read(CHUNK)
        self.ended = not chunk
        try:
            fresh = self.decoder.decode(chunk, final=self.ended)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path}: not UTF-8 text near byte {self.offset}: {error.reason}. "
                + what_else(self.head, "The file is damaged or truncated, or it is not JSON: fetch it again.")
            ) from error
        self.text, self.at = self.text[self.at :] + fresh, 0
        return not self.ended

    def peek(self) -> str:
        """The next character that is no blank, without taking it; an empty string at the end of the file."""
        if self.at < len(self.text) and (character := self.text[self.at]) > " ":
            return character
        while True:
            self.at = _BLANK.match(self.text, self.at).end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def items(self, end: str) -> Iterator[int]:
        """Stand before every item of the array or object that begins here (its number is yielded), then behind `end`."""
        self.at += 1
        self.complete = 0
        while (character := self.peek()) != end:
            complete = self.complete
            if complete and character:
                if character != ",":
                    raise self.broken(f"expected `,` or `{end}`, found {character!r}")
                self.at += 1
                character = self.peek()
                if character == end:
                    raise self.broken(f"a comma before `{end}`")
            if not character:
                raise self.truncated()
            yield complete + 1
            self.complete = complete + 1  # there may have been an array inside
        self.at += 1

    def members(self) -> Iterator[str]:
        """The keys of the object that begins here; at each the text stands before its value."""
        for _ in self.items("}"):
            key = self.element()
            if isinstance(key, str) and not self.peek():
                raise self.truncated()
            if not isinstance(key, str) or self.peek() != ":":
                raise self.broken(f"expected a key and `:`, found {short(key)}")
            self.at += 1
            yield key

    def element(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self.decode(self.text, self.at)
            except RecursionError as error:
                raise self.broken(unusable(error)) from error
            except json.JSONDecodeError as error:
                # an incomplete element fails where the text ends, or inside a string that the text does not close
                is_open = error.msg.startswith("Unterminated string")
                incomplete = error.pos >= len(self.text) - 8 or is_open
                if not incomplete or len(self.text) - self.at > LARGEST_ELEMENT:
                    raise self.broken(error.msg) from error
                if not self.more():
                    is_open = is_open or _OPEN_WORD.match(self.text, error.pos) is not None
                    raise (self.truncated() if is_open else self.broken(error.msg)) from error
                continue
            except ValueError as error:
                raise self.broken(unusable(error)) from error
            # a number at the end of the chunk may go on in the next
            if self.ended or not isinstance(value, int | float) or not _OPEN_NUMBER.match(self.text, end):
                if fault := json_fault(value, self.text, self.at, end):
                    raise self.broken(fault)
                self.at = end
                return value
            self.more()

    def truncated(self) -> UserError:
        return UserError(
            f"{self.path}: the JSON ends too soon: {self.complete} complete elements, then nothing valid "
            f"after byte {self.byte_offset()}. The file is truncated: compare its size with the source and "
            "fetch it again."
        )

    def broken(self, reason: str) -> UserError:
        return UserError(
            f"{self.path}: not valid JSON near byte {self.byte_offset()}, after element {self.complete}: {reason}. "
            "Correct the file there, or fetch it again."
        )
