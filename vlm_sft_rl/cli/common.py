"""What several commands share: options, options made from the fields of dataclasses, and how results are printed."""

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.core import TyperGroup

from ..decoding.config import ENGINES
from ..errors import next_steps, printable
from ..evaluation.decoders import DECODERS, needs_run

DecoderName = StrEnum("DecoderName", {name.replace("-", "_"): name for name in DECODERS})
EngineName = StrEnum("EngineName", {name: name for name in ENGINES})
ModelDir = Annotated[Path, typer.Option("--model", help="Checkpoint or adapter directory.")]
NumProcesses = Annotated[
    int | None,
    typer.Option(
        help="Training processes (one a GPU) on all machines together. Default: what the accelerate config says."
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn at random.")]


SHIPPED = "pocket"  # the model that comes with the package


def model_folder(model: str) -> Path:
    """The folder of a model that was named on the command line."""
    folder = Path(model)
    if model == SHIPPED and not folder.is_dir():
        from ..demos.frame import VERIFIER

        folder = VERIFIER
    return folder


class Commands(TyperGroup):
    """A group that names its commands when it is asked for one that it has not."""

    def resolve_command(self, ctx, args):
        if args and not args[0].startswith("-") and args[0] not in (known := self.list_commands(ctx)):
            ctx.fail(f"There is no command {args[0]!r}. Commands: {', '.join(known)}.")
        return super().resolve_command(ctx, args)


def group(help: str, **options) -> typer.Typer:
    """A group of commands under one name."""
    context = {"help_option_names": ["-h", "--help"]}
    return typer.Typer(
        help=help, cls=Commands, context_settings=context, **{"no_args_is_help": True, **options}
    )


# --- Options from dataclasses ---


@dataclass(frozen=True)
class Setting:
    """An option that stands for a field of a dataclass.

    Attributes:
        key: the field's name.
        name: that of the option.
        kinds: the types of its value.
        is_off: whether it is a switch that is off.
        panel: heading in the help.
    """

    key: str
    name: str
    kinds: tuple
    help: str
    is_off: bool = False
    metavar: str | None = None
    panel: str | None = None

    def parameter(self) -> inspect.Parameter:
        kind = next((kind for kind in (bool, int, float, Path) if kind in self.kinds), str)
        words = "--" + self.name.replace("_", "-")
        both_ways = kind is bool and not self.is_off
        option = typer.Option(
            f"{words}/--no-{words[2:]}" if both_ways else words,
            help=self.help,
            metavar=self.metavar,
            rich_help_panel=self.panel,
            show_default=False,
        )
        annotation = Annotated[kind | None, option]
        return inspect.Parameter(
            self.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
        )

    def read(self, value: Any) -> Any:
        """The value for the dataclass: numbers with commas where it takes several."""
        several = any(get_origin(kind) is tuple for kind in self.kinds)
        return tuple(whole_numbers(self.name, value)) if several and value[:1].isdigit() else value


def settings_of(cls: type, *, prefix: str = "", skip: Sequence[str] = ()) -> list[Setting]:
    """The fields of a dataclass as options, those of its bases last; the help is in their metadata."""
    items = sorted(fields(cls), key=lambda item: item.name not in vars(cls).get("__annotations__", ()))
    return [_setting([(cls.__name__, item)], prefix) for item in items if item.name not in skip]


def decoder_settings(names: Iterable[str] = DECODERS) -> list[Setting]:
    """The options of these decoders, under headings that say which of them have them."""
    names = list(names)
    users: dict[str, list[tuple[str, Field]]] = {}
    for name in names:
        for key, item in DECODERS[name].options().items():
            users.setdefault(key, []).append((name, item))
    settings = []
    for entries in users.values():
        owners = [name for name, _ in entries]
        others = [name for name in names if name not in owners]
        if len(names) == 1:
            panel = None
        elif len(others) < len(owners):
            panel = "All decoders" + (f" but {', '.join(others)}" if others else "")
        else:
            panel = f"Decoder {', '.join(owners)}"
        # a checkpoint or a spec may have switched on what is off by default
        settings.append(replace(_setting(entries, panel=panel), is_off=False))
    return settings


# decoders whose answers are ready without an evaluation
ALONE = [name for name, entry in DECODERS.items() if not needs_run(name, entry.config(**entry.fixed))]


def alone_settings() -> list[Setting]:
    """Those of the decoders that need no evaluation; that a majority decides is a matter of one."""
    return [setting for setting in decoder_settings(ALONE) if setting.key != "fallback"]


def _setting(entries: list[tuple[str, Field]], prefix: str = "", panel: str | None = None) -> Setting:
    """One option for a field that several classes have; where they differ, the help says whose is whose."""
    item, metadata = entries[0][1], entries[0][1].metadata
    help = _by_owner([(name, other.metadata["help"]) for name, other in entries], " ")
    help = re.sub(r"\S*</?\w+>\S*", r"`\g<0>`", help)  # help is Markdown, in which a tag is HTML
    defaults = [(name, _as_default(other.default)) for name, other in entries]
    if any(default for _, default in defaults):
        help += f" [default: {_by_owner([(name, default or 'none') for name, default in defaults], '; ')}]"
    return Setting(
        key=item.name,
        name=prefix + item.name,
        kinds=get_args(item.type) or (item.type,),
        help=help,
        is_off=all(other.default is False for _, other in entries),
        metavar="|".join(metadata["choices"]) if "choices" in metadata else None,
        panel=panel,
    )


def _by_owner(texts: Sequence[tuple[str, str]], between: str) -> str:
    """One text where all owners have it; else that of most of them, and the others' behind their names."""
    owners: dict[str, list[str]] = {}
    for name, text in texts:
        owners.setdefault(text, []).append(name)
    first, *others = sorted(owners, key=lambda text: -len(owners[text]))
    named = [f"{', '.join(owners[text])}: {text}" for text in others]
    alone = not others or len(owners[first]) > len(texts) / 2
    return between.join([first if alone else f"{', '.join(owners[first])}: {first}", *named])


def _as_default(value: Any) -> str:
    """How the help shows a default; empty where there is none to show."""
    if value is True:
        return "on"
    if any(value is nothing for nothing in (MISSING, None, False)):
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def takes(**groups: list[Setting]) -> Callable:
    """A command with options beside those of its signature: `name=settings` hands it, as `name`, the map of those that
    were given on the command line."""

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function)
        plain = [
            item.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for item in signature.parameters.values()
            if item.name not in groups
        ]
        made = [setting.parameter() for settings in groups.values() for setting in settings]

        @functools.wraps(function)
        def command(**values):
            for name, settings in groups.items():
                given = {setting: values.pop(setting.name) for setting in settings}
                values[name] = {s.key: s.read(value) for s, value in given.items() if value is not None}
            return function(**values)

        command.__signature__ = signature.replace(parameters=[*plain, *made])
        command.__annotations__ = {item.name: item.annotation for item in (*plain, *made)}
        return command

    return decorate


# --- Printing and reading ---


def show(value: Any) -> None:
    """Print what a command returned; None prints nothing, a mapping or a report a line for each of its values."""
    from rich.console import Console

    if value is not None:
        values = vars(value) if is_dataclass(value) else value
        text = "\n".join(_lines(values)) if isinstance(values, Mapping) else str(values)
        Console(soft_wrap=True).print(escape(text), highlight=False)


def closing(steps: Mapping[str, str | Sequence[object]]) -> None:
    """The last lines of a command: what can be typed next, see `next_steps`. On stderr, so that results can be piped."""
    from rich.console import Console

    Console(stderr=True, soft_wrap=True).print(escape(next_steps(steps)), highlight=False)


def _lines(values: Mapping, indent: str = "") -> Iterable[str]:
    for name, value in values.items():
        if not isinstance(value, Mapping):
            yield f"{indent}{name}: {value}"
        elif value:
            yield f"{indent}{name}:"
            yield from _lines(value, indent + "  ")


def escape(text: str) -> str:
    """The text as rich prints it literally: its markup, and what would steer a terminal."""
    from rich.markup import escape

    return escape(printable(text))


def whole_numbers(option: str, text: str) -> list[int]:
    """`0,1,2` as numbers.

    Raises UserError: something else.
    """
    from ..errors import UserError

    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"{option} is {text!r}. Write whole numbers with commas, for example 0,1,2."
        ) from None
