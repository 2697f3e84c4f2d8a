"""Settings as dataclasses whose fields have their help and their limits: for a file, a sidecar or a command line."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from types import UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import UserError, short

Config = TypeVar("Config")
_NAMES = {
    str: "text",
    bool: "true or false",
    dict: "a map",
    tuple: "a list",
    list: "a list",
    int: "an integer",
    float: "a number",
}
_SIGNS = {"least": ">=", "above": ">", "most": "<=", "below": "<"}


def setting(default: Any = MISSING, help: str = "", **limits: Any) -> Any:
    """A field with its help; without a default it must be given.

    Args:
        limits: `least`, `most`, `above`, `below` of numbers, `infinite` where .inf is a value too, `choices` of a text,
            `holds`, a placeholder that a text must have. They hold for what lies in maps and lists, too.
    """
    metadata = {"help": help, **limits}
    if isinstance(default, dict | list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def data_seed(args: Any) -> int:
    """The seed of what is random about the data, of transformers' training arguments: `data_seed`, or else `seed`."""
    return args.seed if args.data_seed is None else args.data_seed


@dataclass(frozen=True)
class Checked:
    """Settings that are checked against the types and limits of their fields."""

    method: ClassVar[str] = ""  # what an error begins with

    def __post_init__(self):
        """Raises UserError: a value of the wrong type or outside its range; it names the field, the value and the range."""
        for item in fields(self):
            value = getattr(self, item.name)
            fits = _is_default(value, item) or _fits(value, item.type, item.metadata)
            self.require(fits, item.name, _expected(item.type, item.metadata))

    def require(self, ok: Any, name: str, expected: str) -> None:
        if not ok:
            begin = f"{self.method}: " if self.method else ""
            raise UserError(f"{begin}{name} = {getattr(self, name)!r}, expected {expected}.")


def configured(cls: Callable[..., Config], values: Mapping[str, Any], source: str) -> Config:
    """Settings from a file or a command line.

    Args:
        source: whose settings they are, for errors.

    Raises UserError: a key that does not exist or is missing, or a value of the wrong type or out of range.
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


def check_values(
    cls: type, values: Mapping[str, Any], source: str, limits: Mapping[str, Mapping[str, Any]]
) -> None:
    """Check values for fields of any dataclass, before it is made of them, by the fields' types and limits.

    Args:
        values: keys that are no field of it are left alone.
        source: whose settings they are, for errors.
        limits: of fields that have none of their own, by name.

    Raises UserError: a value of the wrong type or out of range; it names the field, the value and what is expected.
    """
    kinds = get_type_hints(cls)
    for item in fields(cls):
        if item.name not in values:
            continue
        value, kind = values[item.name], kinds[item.name]
        bounds = {**limits.get(item.name, {}), **item.metadata}
        if not (_is_default(value, item) or _fits(value, kind, bounds)):
            hint = "; YAML reads yes, no, on and off as that: quote them" if isinstance(value, bool) else ""
            raise UserError(
                f"{source}: `{item.name}` is {short(value, 200)}, expected {_expected(kind, bounds)}{hint}."
            )


def check_factors(factors: Mapping[str, Any], kinds: Sequence[str], name: str) -> None:
    """Check factors on losses by kind. Raises UserError: a kind that does not exist, or a factor that is no number >= 0."""
    for kind, factor in factors.items():
        if kind not in kinds:
            raise UserError(f"`{name}`: {kind!r} is not one of {', '.join(kinds)}.")
        if not _fits(factor, float, {"least": 0}):
            raise UserError(f"`{name}.{kind}` must be a number >= 0, found {factor!r}.")


def takes_list_of_text(cls: type, name: str) -> bool:
    """Whether a field is a list of texts and takes no text instead."""
    kinds = _parts(get_type_hints(cls)[name])
    return str not in kinds and any(get_origin(kind) is list and get_args(kind) == (str,) for kind in kinds)


def _is_default(value: Any, item: Any) -> bool:
    # 1 == True
    return type(value) is type(item.default) and value == item.default


def _parts(kind: Any) -> tuple:
    """The types that a type stands for; of names and text the names."""
    parts = get_args(kind) if isinstance(kind, UnionType) or get_origin(kind) is Union else (kind,)
    names = any(isinstance(part, type) and issubclass(part, Enum) for part in parts)
    return tuple(part for part in parts if part is not str) if names else parts


def _fits(value: Any, kind: Any, limits: Mapping[str, Any]) -> bool:
    if (parts := _parts(kind)) != (kind,):
        return any(_fits(value, part, limits) for part in parts)
    if kind is Any:
        return True
    if kind is type(None):
        return value is None
    if get_origin(kind) is Literal:
        return any(type(value) is type(word) and value == word for word in get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return isinstance(value, kind) or value in [member.value for member in kind]
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
    if get_origin(kind) in (tuple, list):
        return isinstance(value, tuple | list) and all(_fits(item, inner[0], limits) for item in value)
    return isinstance(value, kind)


def _in_range(value: float, limits: Mapping[str, Any]) -> bool:
    if isinstance(value, int):  # no library takes longer ones
        is_number = -(2**63) <= value < 2**63
    else:
        is_number = math.isfinite(value) or (value == math.inf and "infinite" in limits)
    return (
        is_number
        and limits.get("least", -math.inf) <= value <= limits.get("most", math.inf)
        and limits.get("above", -math.inf) < value
        and (value < limits["below"] if "below" in limits else True)
    )


def _expected(kind: Any, limits: Mapping[str, Any]) -> str:
    parts = _parts(kind)
    words = [_described(part, limits) for part in parts if part is not type(None)]
    if type(None) in parts:
        words.append("null")
    # "a number >= 0, or null"; "text, a map of text, or null"
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])}, or {words[-1]}"


def _described(kind: Any, limits: Mapping[str, Any]) -> str:
    choices = limits.get("choices", ()) if kind is str else ()
    if get_origin(kind) is Literal:
        choices = get_args(kind)
    elif isinstance(kind, type) and issubclass(kind, Enum):
        choices = [member.value for member in kind]
    if choices:
        *others, last = map(str, choices)
        return f"{', '.join(others)} or {last}" if others else last
    words = _NAMES.get(get_origin(kind) or kind, getattr(kind, "__name__", str(kind)))
    if kind in (int, float):
        bounds = " and ".join(f"{sign} {limits[name]}" for name, sign in _SIGNS.items() if name in limits)
        return f"{words} {bounds}".strip()
    if kind is str:
        return f"{words} with {limits['holds']}" if "holds" in limits else f"{words} that is not empty"
    if get_args(kind):
        return f"{words} of {_expected(get_args(kind)[1 if get_origin(kind) is dict else 0], limits)}"
    return words
