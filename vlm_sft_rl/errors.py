"""The one exception type that is meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can cure: the message names the file, the row, the field, what was expected, and the cure.

    The console command prints the message alone (no traceback) and exits with status 2.
    """


def first_line(error: Exception) -> str:
    """What a library's error says, short enough to stand in a message of ours."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def printable(text: object) -> str:
    """The text for a terminal: what would steer it (escape bytes in a file's name) or cannot be encoded is spelt out."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(text))


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
