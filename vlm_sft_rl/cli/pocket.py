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


@app.command("reproduce-sc-tune")
def reproduce_sc_tune(
    output_dir: Annotated[Path, typer.Argument(help="Everything is written here; run again to resume.")],
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0.", min=1)] = 3,
    variants: Annotated[
        str, typer.Option(help="Comma-separated names; default: all (both, describer_only, locator_only, …).")
    ] = "",
    scenes: Annotated[int, typer.Option(help="Test scenes.", min=10)] = 300,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the loop; default: the recipe's.", min=1)
    ] = None,
) -> None:
    """Which part of the describer-locator loop does what: variants over seeds (hours on a CPU)."""
    from ..demos.reproduce_sc_tune import VARIANTS, run
    from ..errors import UserError

    names = [name.strip() for name in variants.split(",") if name.strip()] or list(VARIANTS)
    if unknown := [name for name in names if name not in VARIANTS]:
        raise UserError(f"--variants: {unknown[0]!r} is unknown. Known: {', '.join(VARIANTS)}.")
    run(output_dir, seeds=range(seeds), variants=names, scenes=scenes, steps=steps)
