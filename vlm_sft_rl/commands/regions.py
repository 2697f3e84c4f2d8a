"""`vlm-sft-rl regions …`: boxes to describe and to locate."""

from pathlib import Path
from typing import Annotated

import typer

from .common import ModelDir, Seed, group

app = group("Boxes on images: measure describe-then-locate.")


@app.command("eval")
def evaluate(
    model_dir: ModelDir,
    regions: Annotated[Path, typer.Option(help="Region rows; with `expressions` REC is measured too.")],
    output_dir: Annotated[Path, typer.Option(help="Samples, summary and report; run again to resume.")],
    image_root: Annotated[Path | None, typer.Option(help="Folder that image paths are relative to.")] = None,
    box_convention: Annotated[
        str | None, typer.Option(help="Default: the checkpoint's or its family's.")
    ] = None,
    describe_prompt: Annotated[
        str | None, typer.Option(help="With {box}; default: the checkpoint's.")
    ] = None,
    locate_prompt: Annotated[
        str | None, typer.Option(help="With {description}; default: the checkpoint's.")
    ] = None,
    reg: Annotated[bool, typer.Option("--reg", help="CIDEr and METEOR against the expressions too.")] = False,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    limit: Annotated[int | None, typer.Option(help="Only the first regions.", min=1)] = None,
    rounds: Annotated[int, typer.Option(help="Bootstrap rounds.", min=10)] = 1000,
    seed: Seed = 0,
    overwrite: Annotated[
        bool, typer.Option(help="Throw away what another configuration left there.")
    ] = False,
) -> None:
    """Describe every box and find it again: self-consistency, REC acc@0.5, REG scores, and a page with the boxes."""
    from ..region_eval import evaluate_regions

    evaluate_regions(
        model_dir,
        regions,
        output_dir,
        image_root=image_root,
        box_convention=box_convention,
        describe_prompt=describe_prompt,
        locate_prompt=locate_prompt,
        reg=reg,
        batch_size=batch_size,
        limit=limit,
        rounds=rounds,
        seed=seed,
        overwrite=overwrite,
    )
