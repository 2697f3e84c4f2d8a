"""`vlm-sft-rl pocket …`: the embedded world and its small VLM."""

from pathlib import Path
from typing import Annotated

import typer

from .common import Seed, group, show

app = group("The embedded world and its small VLM.")


@app.command()
def build(
    output_dir: Annotated[Path, typer.Argument(help="Where the model goes; run again to resume.")],
    seed: Seed = 0,
) -> None:
    """Pre-train the pocket VLM from nothing (some twenty minutes on two free cores) and measure it."""
    from ..pocket.build import BuildConfig, build_and_measure

    show(build_and_measure(output_dir, BuildConfig(seed=seed)))


@app.command()
def world(
    output_dir: Annotated[Path, typer.Argument(help="Where the files go.")],
    seed: Seed = 0,
) -> None:
    """Write the pocket world to disk: images, captions, questions, exact ground truth."""
    from ..pocket.dataset import build_world

    show(build_world(output_dir, seed=seed))
