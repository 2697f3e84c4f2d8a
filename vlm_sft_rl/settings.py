"""Settings as dataclasses whose fields have their help and their limits: for a file, a sidecar or a command line."""

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from types import UnionType
from typing import Any, ClassVar, TypeVar, get_args, get_origin

from .errors import UserError

Config = TypeVar("Config")
_NAMES = {
    str: "text",
    bool: "true or false",
    dict: "a map",
    tuple: "a list",
    int: "an integer",
    float: "a number",
}
_SIGNS = {"least": ">=", "above": ">", "most": "<=", "below": "<"}


def setting(default: Any = MISSING, help: str = "", **limits: Any) -> Any:
    """A field with its help; without a default it must be given.

    Args:
        limits: `least`, `most`, `above`, `below` of numbers, `choices` of a text, `holds`, a placeholder that a text must
            have. They hold for what lies in maps and lists, too.
    """
    metadata = {"help": help, **limits}
    if isinstance(default, dict | list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Checked:
    """Settings that are checked against the types and limits of their fields."""

    method: ClassVar[str] = ""  # what an error begins with

    def __post_init__(self):
        """Raises UserError: a value of the wrong type or outside its range; it names the field, the value and the range."""
        for item in fields(self):
            value = getattr(self, item.name)
            fits = value == item.default or _fits(value, item.type, item.metadata)
            self.require(fits, item.name, _expected(item.type, item.metadata))

    def require(self, ok: Any, name: str, expected: str) -> None:
        if not ok:
            begin = f"{self.method}: " if self.method else ""
            raise UserError(f"{begin}{name} = {getattr(self, name)!r}, expected {expected}.")


def configured(cls: Callable[..., Config], values: Mapping[str, Any], source: str) -> Config:
    """Settings from a file or a command line.

    Args:
        source: whose settings they are, for errors.

    Raises:
        UserError: a key that does not exist or is missing, or a value of the wrong type or out of range.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{source}: expected a map of keys to values, found {type(values).__name__}.")
    known = {item.name: item for item in fields(cls)}
    if stray := [name for name in values if name not in known]:
        raise UserError(f"{source}: there is no {stray[0]!r}. {cls.__name__} has {', '.join(known)}.")
    for name, item in known.items():
        if name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise UserError(f"{source}: {name!r} is missing.")
    return cls(**values)


def _fits(value: Any, kind: Any, limits: Mapping[str, Any]) -> bool:
    if isinstance(kind, UnionType):
        return any(_fits(value, part, limits) for part in get_args(kind))
    if kind is Any:
        return True
    if kind is type(None):
        return value is None
    if kind in (int, float):
        number = isinstance(value, int | float if kind is float else int) and not isinstance(value, bool)
        return number and _in_range(value, limits)
    if kind is str:
        return (
            isinstance(value, str)
            and bool(value.strip())
            and value in limits.get("choices", (value,))
            and limits.get("holds", "") in value
        )
    inner = get_args(kind)
    if get_origin(kind) is dict:
        keys, items = inner
        return isinstance(value, dict) and all(
            _fits(name, keys, {}) and _fits(item, items, limits) for name, item in value.items()
        )
    if get_origin(kind) is tuple:
        return isinstance(value, tuple | list) and all(_fits(item, inner[0], limits) for item in value)
    return isinstance(value, kind)


def _in_range(value: float, limits: Mapping[str, Any]) -> bool:
    return (
        math.isfinite(value)
        and limits.get("least", -math.inf) <= value <= limits.get("most", math.inf)
        and limits.get("above", -math.inf) < value < limits.get("below", math.inf)
    )


def _expected(kind: Any, limits: Mapping[str, Any]) -> str:
    kinds = (
        [part for part in get_args(kind) if part is not type(None)] if isinstance(kind, UnionType) else [kind]
    )
    words = [_described(part, limits) for part in kinds]
    if isinstance(kind, UnionType) and type(None) in get_args(kind):
        words.append("null")
    # "a number >= 0, or null"; "text, a map of text, or null"
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])}, or {words[-1]}"


def _described(kind: Any, limits: Mapping[str, Any]) -> str:
    if kind is str and "choices" in limits:
        *others, last = limits["choices"]
        return f"{', '.join(others)} or {last}"
    words = _NAMES.get(get_origin(kind) or kind, getattr(kind, "__name__", str(kind)))
    if kind in (int, float):
        bounds = " and ".join(f"{sign} {limits[name]}" for name, sign in _SIGNS.items() if name in limits)
        return f"{words} {bounds}".strip()
    if kind is str:
        return f"{words} with {limits['holds']}" if "holds" in limits else f"{words} that is not empty"
    if get_args(kind):
        return f"{words} of {_expected(get_args(kind)[1 if get_origin(kind) is dict else 0], limits)}"
    return words
