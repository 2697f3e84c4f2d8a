"""Recipes, accelerate configs and eval specs: found by name or by path, parsed, checked. No torch here.

Names are paths below the kind's folder without `.yaml`: `reverse/pocket`, `zero2`, `pocket_captions`. In a checkout the
folders lie beside the package; in an installed wheel, inside of it.
"""

import difflib
import re
from collections.abc import Collection, Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError, short
from .io import read_text

KINDS = {"recipes": "recipe", "accelerate_configs": "accelerate config", "eval": "eval spec"}
LOOPS = ("r3v", "rewind")  # methods of `self-train`
METHODS = ("reverse", "sft", "reflection_dpo", *LOOPS, "sc_tune", "sco", "grpo")
PACKAGE = Path(__file__).parent
_PART, _INDENT = (
    re.compile(r"# (?=.{11}\S)([A-Z]\w+(?:  +| to ))(.+)"),
    "#" + " " * 12,
)  # of a recipe's header
MOST_VALUES = 100_000  # in one file; a shipped one has less than a hundred


def root(kind: str) -> Path:
    """The folder of a kind: `recipes`, `accelerate_configs` or `eval`.

    Raises:
        UserError: no such kind.
    """
    if kind not in KINDS:
        raise UserError(f"No kind {kind!r}. Kinds are {', '.join(KINDS)}.")
    checkout = PACKAGE.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / kind).is_dir():
        return checkout / kind
    return PACKAGE / "_shipped" / kind


def names(kind: str) -> list[str]:
    """Every shipped name of a kind, sorted."""
    folder = root(kind)
    return sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml"))


def find(kind: str, name: str | Path) -> Path:
    """The file of that path, or the shipped one of that name (with or without `.yaml`).

    Raises:
        UserError: neither exists; the closest shipped names are listed.
    """
    if Path(name).is_file():
        return Path(name)
    wanted = str(name).removesuffix(".yaml")
    shipped = names(kind)
    if wanted in shipped:
        return root(kind) / f"{wanted}.yaml"
    close = [s for s in shipped if wanted and wanted in s] or difflib.get_close_matches(
        wanted, shipped, 3, 0.4
    )
    hint = f"Did you mean {' or '.join(close)}?" if close else f"Shipped are: {', '.join(shipped)}."
    raise UserError(f"{name}: no such {KINDS[kind]}, neither a file nor a shipped name. {hint}")


def header(path: str | Path) -> dict[str, str]:
    """What the comment at the head of a recipe says: `title`, and by its first word each part (`Hardware`, `Data`,
    `Launch`, …) as one line."""
    parts, name = {"title": ""}, "title"
    for line in read_text(path).replace("\\\n", "\n").splitlines():
        if not line.startswith("#"):
            break
        if part := _PART.fullmatch(line):
            name = part[1].strip()
            parts[name] = part[2]
        elif name == "title" or line.startswith(_INDENT):
            parts[name] += f" {line.strip('#')}"
        else:  # a remark of its own
            name = ""
            parts[name] = ""
    return {name: " ".join(text.split()) for name, text in parts.items() if name}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping of plain values.

    Raises:
        UserError: no such file, a syntax error or a value that is none (line and column are named), a key given twice, not a
            mapping, nested too deeply, or other values than JSON has.
    """
    return parse_yaml(read_text(path), str(path))


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """YAML text that holds a mapping of plain values (text, numbers, true or false, null, lists, mappings).

    Raises:
        UserError: see `read_yaml`.
    """
    try:
        value = yaml.load(text, Loader=PlainLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{where}{place}: not valid YAML ({error.problem}). Correct that line.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML ({error}).") from error
    except RecursionError as error:
        raise UserError(f"{where}: nested too deeply. Write it flat.") from error
    if not isinstance(value, dict):
        kind = "nothing" if value is None else f"one {type(value).__name__}"
        raise UserError(f"{where}: expected `key: value` lines, found {kind}.")
    check_plain(value, where)
    return value


def check_plain(value: dict, where: str) -> None:
    """Raises UserError: a key that is no text, a value that is none of JSON's kinds (a date), or too many of them, aliases
    counted wherever they stand."""
    waiting, count = [("", value)], 0
    while waiting:
        name, item = waiting.pop()
        if (count := count + 1) > MOST_VALUES:
            raise UserError(
                f"{where}: more than {MOST_VALUES:,} values, aliases counted. Is this the right file?"
            )
        if isinstance(item, dict):
            for key in item:
                if not isinstance(key, str):
                    raise UserError(f"{where}: the key {short(key)} is no text. Write it in quotes.")
            waiting += ((f"{name}.{key}"[-80:] if name else key, part) for key, part in item.items())
        elif isinstance(item, list):
            waiting += ((name, part) for part in item)
        elif item is not None and not isinstance(item, str | int | float):
            raise UserError(
                f"{where}: `{name}` is {item!s:.80} ({type(item).__name__}). Expected text, a number, true or false; text "
                "that looks like something else stands in quotes."
            )


def load_recipe(path: str | Path, valid: Collection[str] | None = None) -> dict[str, Any]:
    """Read a training recipe.

    Args:
        path: the file.
        valid: the keys allowed besides `method`; None leaves them unchecked (`train.read_recipe` checks them against the
            method's config dataclasses, for which it imports torch).

    Raises:
        UserError: not YAML, `method` missing or unknown, or an unknown key (with the nearest valid ones).
    """
    recipe = read_yaml(path)
    method = recipe.get("method")
    if method not in METHODS:
        raise UserError(f"{path}: `method` is {method!r}. Set it to one of: {', '.join(METHODS)}.")
    if valid is not None:
        check_keys(recipe, {"method", *valid}, str(path))
    return recipe


def check_keys(given: Iterable[str], valid: Collection[str], where: str) -> None:
    """Raises UserError for keys that are not valid, each with its nearest valid ones."""
    unknown = [key for key in given if key not in valid]
    if not unknown:
        return
    lines = []
    for key in unknown:
        close = difflib.get_close_matches(key, valid, 3, 0.6)
        lines.append(
            f"`{key}`" + (f" (did you mean {' or '.join(f'`{c}`' for c in close)}?)" if close else "")
        )
    raise UserError(f"{where}: unknown key {', '.join(lines)}. Correct or remove it.")


class PlainLoader(yaml.SafeLoader):
    """`safe_load` that refuses a key given twice (YAML forbids it; PyYAML keeps the last without a word), names the line of
    a value that is none (`!!int abc`), and reads numbers as YAML 1.2 does: 1e-5 is one, 1:30 (90 in YAML 1.1) and 017 (15)
    are text."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in getattr(node, "value", ()):
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_object(self, node, deep=False):
        try:
            return super().construct_object(node, deep)
        except (
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
        ) as error:  # as the constructor of each type refuses
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"{short(node.value)} is no {kind}", node.start_mark
            ) from error


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
PlainLoader.add_implicit_resolver(
    _INT, re.compile(r"[-+]?(0|[1-9][\d_]*|0x[\da-fA-F_]+)$", re.ASCII), list("-+0123456789")
)
PlainLoader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"[-+]?(\d[\d_]*\.\d*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$",
        re.ASCII,
    ),
    list("-+.0123456789"),
)
