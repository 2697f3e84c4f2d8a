"""The one exception type that is meant for the person at the keyboard."""

import re
import shlex
from collections.abc import Mapping, Sequence

# an option of a command line whose value is nobody else's business
SECRET_OPTION = re.compile(r"(--?[\w-]*(?:key|token|secret|password))[= ]\S+", re.IGNORECASE)

LONGEST_VALUE, LONGEST_MESSAGE = 200, 2000  # characters
_QUOTED = re.compile(rf"(?<!\w)(['\"`])((?:(?!\1|…).){{{LONGEST_VALUE}}})(?:(?!\1|…).)+\1(?!\w)", re.DOTALL)


def short(value: object, length: int = 80) -> str:
    """A value as it would be written in Python, without what goes beyond `length` characters; its quotes stay a pair."""
    text = repr(value)
    if len(text) <= length:
        return text
    return text[:length] + "…" + (text[-1] if text[0] in "'\"" else "")


def shortened(message: str) -> str:
    """A message without the middle of what it quotes from a file, a server or a command line at length."""
    if len(message) > LONGEST_VALUE:
        message = _QUOTED.sub(r"\1\2…\1", message)
    if len(message) <= LONGEST_MESSAGE:
        return message
    return f"{message[: LONGEST_MESSAGE * 3 // 4]} … {message[-LONGEST_MESSAGE // 4 :]}"


class UserError(Exception):
    """Something the user can cure: the message names the file, the row, the field, what was expected, and the cure.

    The console command prints the message alone (no traceback) and exits with status 2. What it quotes is `shortened`.
    """

    def __init__(self, message: str = ""):
        super().__init__(shortened(message))


class NotFinite(UserError):
    """A model gives NaN or infinite logits, so no token can be chosen."""


def missing_package(error: ImportError) -> UserError:
    """What a library says of an optional package that is not installed, as a message.

    Raises ImportError: `error`, where it is about something else.
    """
    if "install" not in str(error).lower():
        raise error
    return UserError(f"{first_line(error)} Install it, or change the setting that asks for it.")


# what steers a terminal or turns the direction of writing, and halves of characters, which no terminal can be sent
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text of a file, a model or a server as a terminal may show it: control characters stand as JSON's escapes."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def in_words(counts: Mapping[str, int]) -> str:
    """Counts that are not 0: `3614 rows, 1807 negatives`."""
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count)


def next_steps(steps: Mapping[str, str | Sequence[object]]) -> str:
    """What can be typed next, a line each: `To PURPOSE: COMMAND`.

    Args:
        steps: by purpose, the words of one of our commands without its name; or any text.
    """
    return "\n".join(
        f"To {purpose}: {step if isinstance(step, str) else shlex.join(['vlm-sft-rl', *map(str, step)])}"
        for purpose, step in steps.items()
    )


def first_line(error: Exception) -> str:
    """What a library's error says, short enough to stand in a message of ours."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


# What can be wrong with a row, as data: an error that carries its kind, so that it can be counted.
FORMAT = "format"
PLACEHOLDER = "placeholder mismatch"
MISSING_IMAGE = "missing image"
UNREADABLE_IMAGE = "unreadable image"
OUTSIDE_ROOT = "path leaves image_root"
IMAGE_BOMB = "image bomb"
TAGS = "unbalanced tags"
TOO_LONG = "too long"
NO_SUPERVISION = "no supervised token"
DUPLICATE_ID = "duplicate id"
EMPTY_ANSWER = "empty answer"
TEMPLATE = "chat template"
PROCESSOR = "refused by the processor"
MIXED = "refused beside others"


class RowError(UserError):
    """One row cannot be used.

    Attributes:
        kind: one of the constants of this module; empty when the error comes out of a data loader's worker.
        reason: what was found, what was expected and the cure, without the place.
        where: `file:row` (or the row's id), empty when not known yet.
    """

    def __init__(self, kind: str, reason: str | None = None, where: str = ""):
        if reason is None:
            # torch raises a worker's error anew from its class and the text of its traceback, and from nothing else
            kind, reason = "", _own_message(kind)
        super().__init__(f"{where}: {reason}" if where else reason)
        self.kind = kind
        self.reason = reason
        self.where = where

    def at(self, where: str) -> "RowError":
        """The same error with its place, unless it has one already."""
        return self if self.where else RowError(self.kind, self.reason, where)

    def __reduce__(self):
        # pickle makes an exception anew from its arguments, and here those are the message alone
        return RowError, (self.kind, self.reason, self.where)


def _own_message(text: str) -> str:
    """What a traceback says after its last RowError (causes stand before it); a text without one as it is."""
    return text.rpartition(f"{RowError.__module__}.{RowError.__qualname__}: ")[2].strip()
