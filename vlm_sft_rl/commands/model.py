"""`vlm-sft-rl model …`: checkpoints."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .common import group, show

app = group("Prepare a checkpoint for training.")


class Init(StrEnum):
    mean = "mean"
    semantic = "semantic"


@app.command()
def prepare(
    source: Annotated[Path, typer.Argument(help="Any Hugging Face VLM directory.")],
    target: Annotated[Path, typer.Argument(help="Where the prepared checkpoint goes.")],
    init: Annotated[Init, typer.Option(help="How the new rows start.")] = Init.mean,
) -> None:
    """Add the three verification tokens to a VLM and save it as an ordinary directory."""
    from ..models.prepare import prepare as prepare_model

    show(prepare_model(source, target, init=init.value))
