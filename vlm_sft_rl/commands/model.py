"""`vlm-sft-rl model …`: checkpoints."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .common import group, show

app = group("Convert a checkpoint, or prepare it for training.")


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


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="LLaVA folder in the authors' format, or a language model.")],
    target: Annotated[Path, typer.Argument(help="Where the Hugging Face LLaVA directory goes.")],
    vision_tower: Annotated[
        str | None, typer.Option(help="CLIP or SigLIP folder; default: the config's `mm_vision_tower`.")
    ] = None,
    projector: Annotated[
        Path | None, typer.Option(help="mm_projector.bin, when it is not among the source's weights.")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="vicuna, llama3 or a Jinja file; default: by the tokenizer.")
    ] = None,
    pad: Annotated[
        bool | None,
        typer.Option("--pad/--crop", help="Pad pictures to a square, or crop; default: as the config says."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's own), bfloat16 or float32.")] = "auto",
) -> None:
    """Turn a LLaVA-1.5 or LLaVA-MORE checkpoint of its authors into an ordinary directory of transformers."""
    from ..models.convert import convert as convert_model

    show(
        convert_model(
            source,
            target,
            vision_tower=vision_tower,
            projector=projector,
            chat_template=chat_template,
            pad=pad,
            dtype=dtype,
        )
    )
