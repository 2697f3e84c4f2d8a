"""`vlm-sft-rl regions …`: boxes to describe and to locate."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .common import ModelDir, Seed, group, show

app = group("Boxes on images: convert them to region rows, measure describe-then-locate.")


class Source(StrEnum):
    coco = "coco"
    objects365 = "objects365"
    refcoco = "refcoco"
    sc_tune = "sc-tune"


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A COCO or Objects365 file, RefCOCO lines, SC-Tune's list.")],
    target: Annotated[Path, typer.Argument(help="JSONL file of region rows to write.")],
    source_format: Annotated[Source, typer.Option("--format", help="What the source is.")] = Source.coco,
    image_root: Annotated[Path | None, typer.Option(help="Folder of the images (sc-tune needs it).")] = None,
    min_side: Annotated[float, typer.Option(help="Shortest side of a box, in pixels.", min=0)] = 0,
    min_area: Annotated[float, typer.Option(help="Smallest share of the image.", min=0, max=1)] = 0.0,
    max_area: Annotated[float, typer.Option(help="Largest share of the image.", min=0, max=1)] = 1.0,
    max_same_label: Annotated[
        int | None, typer.Option(help="At most so many boxes of one label in an image; 1: unique.", min=1)
    ] = None,
    max_per_image: Annotated[int | None, typer.Option(help="The largest boxes of an image.", min=1)] = None,
) -> None:
    """Convert published box files to region rows; what is left out is counted by reason."""
    from ..data.region_sources import convert_regions
    from ..data.regions import RegionFilter

    keep = RegionFilter(min_side, min_area, max_area, max_same_label, max_per_image)
    show(dict(convert_regions(source, target, source_format.value, image_root=image_root, keep=keep)))


@app.command("eval")
def evaluate(
    model_dir: ModelDir,
    regions: Annotated[Path, typer.Option(help="Region rows; with `expression` REC is measured too.")],
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
