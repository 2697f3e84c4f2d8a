"""What the JSON of a file of ours must look like, and the one message where it does not.

A shape is a pattern of plain Python values:

    str, bool, None, dict, list   a value of exactly this type
    Number(…)                     a finite number within its limits; `true` is none
    [shape]                       a list of such values; [shape, shape, …] of exactly as many
    {"key": shape, "key?": shape} an object with these fields, further ones may be there; `?`: may be missing
    Map(shape)                    an object with such values under any keys
    Kinds("kind", {name: shape})  an object whose field `kind` says which fields it has
    (shape, shape)                one of these
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError, short
from .io import read_json, read_jsonl

Shape = Any
_HALF = re.compile("[\ud800-\udfff]")
_NAMES = {
    str: "text",
    bool: "true or false",
    dict: "an object",
    list: "a list",
    int: "a number",
    float: "a number",
    type(None): "null",
}


@dataclass(frozen=True)
class Number:
    least: float = -math.inf
    most: float = math.inf
    whole: bool = False

    def holds(self, value: Any) -> bool:
        kinds = int if self.whole else (int, float)
        # larger ones do not fit into a float
        sane = isinstance(value, kinds) and not isinstance(value, bool) and abs(value) < 1e300
        # a probability may be rounded to a hair above 1
        return sane and self.least <= value <= self.most + 1e-6

    def __str__(self) -> str:
        name = "a whole number" if self.whole else "a number"
        if math.isfinite(self.most):
            return f"{name} from {self.least:g} to {self.most:g}"
        return f"{name} of at least {self.least:g}" if math.isfinite(self.least) else name


@dataclass(frozen=True)
class Map:
    values: Shape


@dataclass(frozen=True)
class Kinds:
    field: str
    shapes: Mapping[str, Shape]


COUNT = Number(0, whole=True)
SHARE = Number(0, 1)
AMOUNT = Number(0)
NUMBER = Number()


def fault(value: Any, shape: Shape, path: str = "") -> str | None:
    """The first place where a value departs from a shape, in words; None where it fits."""
    if isinstance(shape, tuple):
        faults = [fault(value, part, path) for part in shape]
        if None in faults:
            return None
        # of an object or a list that is there, say what is wrong inside of it
        inner = [f for part, f in zip(shape, faults, strict=True) if f and _kind(part) is type(value)]
        return inner[0] if inner else _departs(path, " or ".join(map(_named, shape)), value)
    if not _fits(value, shape):
        return _departs(path, _named(shape), value)
    if isinstance(shape, Kinds):
        name = value.get(shape.field)
        if not isinstance(name, str) or name not in shape.shapes:
            return _departs(_below(path, shape.field), f"one of {', '.join(shape.shapes)}", name)
        shape = shape.shapes[name]
    return next(filter(None, _inside(value, shape, path)), None)


def _inside(value: Any, shape: Shape, path: str) -> Iterator[str | None]:
    if isinstance(shape, list):
        if len(shape) > 1 and len(value) != len(shape):
            yield _departs(path, f"a list of {len(shape)}", value)
        for number, item in enumerate(value):
            yield fault(item, shape[number % len(shape)], f"{path}[{number}]")
    elif isinstance(shape, Map):
        for key, item in value.items():
            yield fault(item, shape.values, _below(path, key))
    elif isinstance(shape, dict):
        for name, part in shape.items():
            key = name.removesuffix("?")
            if key in value:
                yield fault(value[key], part, _below(path, key))
            elif not name.endswith("?"):
                yield f"the field `{_below(path, key)}` is missing"


def _kind(shape: Shape) -> type | None:
    if isinstance(shape, dict | Map | Kinds):
        return dict
    return list if isinstance(shape, list) else shape


def _fits(value: Any, shape: Shape) -> bool:
    if isinstance(shape, Number):
        return shape.holds(value)
    if shape is str:  # half of a surrogate pair cannot be written again
        return type(value) is str and (value.isascii() or not _HALF.search(value))
    return value is None if shape is None else type(value) is _kind(shape)


def _named(shape: Shape) -> str:
    return str(shape) if isinstance(shape, Number) else _NAMES[_kind(shape) or type(None)]


def _below(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _departs(path: str, expected: str, value: Any) -> str:
    place = f"field `{path}`: " if path else ""
    return f"{place}expected {expected}, found {short(value, 60)}"


def require(value: Any, shape: Shape, where: str, cure: str) -> Any:
    """The value, which has this shape.

    Args:
        where: its file, and its line.
        cure: one sentence, for the message.

    Raises UserError: it has not; file, field and cure are named.
    """
    if reason := fault(value, shape):
        raise UserError(f"{where}: {reason}. {cure}")
    return value


def read_object(path: str | Path, shape: Shape, cure: str) -> Any:
    """The content of a JSON file of ours. Raises UserError: it cannot be read, or has not this shape."""
    return require(read_json(path), shape, str(path), cure)


def read_lines(path: str | Path, shape: Shape, cure: str, unique: str | None = None) -> Iterator[dict]:
    """The lines of a JSONL file of ours.

    Args:
        unique: a field that no two lines share.

    Raises UserError: the file cannot be read, a line has not this shape, or says again what another one has said.
    """
    check = once(path, unique)
    for number, row in read_jsonl(path):
        where = f"{path}, line {number}"
        check(require(row, shape, where, cure), number)
        yield row


def once(path: str | Path, field: str | None) -> Callable[[dict, int], None]:
    """A function that is given the lines of a file, and raises UserError where two share this field."""
    seen: dict[Any, int] = {}

    def check(row: dict, number: int) -> None:
        if field is None:
            return
        before = seen.setdefault(row[field], number)
        if before != number:
            raise UserError(
                f"{path}, line {number}: the {field} {row[field]!r} is already on line {before}. Remove one of the two."
            )

    return check
