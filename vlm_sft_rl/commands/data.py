"""`vlm-sft-rl data …`: training rows."""

from pathlib import Path
from typing import Annotated

import typer

from .common import ModelDir, group, show

app = group("Check, look at and convert training rows.")


@app.command()
def validate(
    rows: Annotated[Path, typer.Argument(help="Training rows (JSON or JSONL).")],
    model_dir: Annotated[
        Path | None, typer.Option("--model", help="Check tokens with this processor too.")
    ] = None,
    image_root: Annotated[Path | None, typer.Option(help="Folder that image paths are relative to.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest row allowed, in tokens.", min=1)] = None,
) -> None:
    """Predict what training would trip over; exits with status 1 if anything is wrong."""
    from rich.console import Console

    from ..data.validate import validate as check

    report = check(rows, processor_or_path=model_dir, image_root=image_root, max_length=max_length)
    Console().print(report)
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def preview(
    rows: Annotated[Path, typer.Argument(help="Training rows (JSON or JSONL).")],
    model_dir: ModelDir,
    row: Annotated[str, typer.Option(help="Position from 0, or a row's id.")] = "0",
    image_root: Annotated[Path | None, typer.Option(help="Folder that image paths are relative to.")] = None,
) -> None:
    """Show every token of one row with its role, mask and weight."""
    from ..data.preview import preview_file

    preview_file(rows, model_dir, row=row, image_root=image_root)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="LLaVA JSON, the published tagged set, or TRL rows.")],
    target: Annotated[Path, typer.Argument(help="JSONL file of rows to write.")],
    source_format: Annotated[str, typer.Option("--format", help="llava, reverse or trl.")] = "llava",
) -> None:
    """Convert a source file to rows, streamed."""
    from ..data.convert import convert as convert_file

    show(convert_file(source, target, format=source_format))
