"""What several commands share: options, and how results are printed."""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from typer.core import TyperGroup


class Decoder(StrEnum):
    greedy = "greedy"
    sample = "sample"
    retrospective = "retrospective"
    drop = "drop"
    stop = "stop"
    vcd = "vcd"
    dola = "dola"
    opera = "opera"
    correct = "correct"
    majority = "majority"
    self_select = "self-select"
    self_refine = "self-refine"
    best_of_n = "best-of-n"
    sentence_beam = "sentence-beam"
    stage_beam = "stage-beam"
    swires = "swires"


ModelDir = Annotated[Path, typer.Option("--model", help="Checkpoint or adapter directory.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]


class Commands(TyperGroup):
    """A group that names its commands when it is asked for one that it has not."""

    def resolve_command(self, ctx, args):
        if args and not args[0].startswith("-") and args[0] not in (known := self.list_commands(ctx)):
            ctx.fail(f"There is no {args[0]!r} here, but {', '.join(known)}.")
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
    """

    key: str
    name: str
    kinds: tuple
    help: str
    is_off: bool = False

    def parameter(self) -> inspect.Parameter:
        kind = next((kind for kind in (bool, int, float, Path) if kind in self.kinds), str)
        words = "--" + self.name.replace("_", "-")
        both_ways = kind is bool and not self.is_off
        option = typer.Option(
            f"{words}/--no-{words[2:]}" if both_ways else words, help=self.help, show_default=False
        )
        annotation = Annotated[kind | None, option]
        return inspect.Parameter(
            self.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
        )


def settings_of(cls: type, *, prefix: str = "", skip: Sequence[str] = ()) -> list[Setting]:
    """The fields of a dataclass as options; the help is in their metadata."""
    settings = []
    for item in fields(cls):
        if item.name in skip:
            continue
        help = item.metadata["help"]
        default = "None" if item.default is MISSING else str(item.default)
        if default not in ("None", "False"):
            help += f" [{default}]"
        kinds = get_args(item.type) or (item.type,)
        settings.append(Setting(item.name, prefix + item.name, kinds, help, default == "False"))
    return settings


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
                values[name] = {s.key: value for s, value in given.items() if value is not None}
            return function(**values)

        command.__signature__ = signature.replace(parameters=[*plain, *made])
        command.__annotations__ = {item.name: item.annotation for item in (*plain, *made)}
        return command

    return decorate


# --- Printing and reading ---


def show(value: Any) -> None:
    """Print what a command returned; None prints nothing."""
    from rich.console import Console

    if value is not None:
        Console().print(value if not isinstance(value, Path | str) else escape(str(value)))


def escape(text: str) -> str:
    """The text with rich's markup taken literally."""
    from rich.markup import escape

    return escape(text)


def whole_numbers(option: str, text: str) -> list[int]:
    """`0,1,2` as numbers.

    Raises:
        UserError: something else.
    """
    from ..errors import UserError

    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"{option} is {text!r}. Write whole numbers with commas, for example 0,1,2."
        ) from None
