"""What several commands share: options, and how results are printed."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

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
