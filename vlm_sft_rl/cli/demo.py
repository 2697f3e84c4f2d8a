"""`vlm-sft-rl demo …`: each method end to end on the pocket world."""

from pathlib import Path
from typing import Annotated

import typer

from .common import Seed, group, whole_numbers

app = group(
    "Watch a method at work on the pocket world, from base weights to a report. Without a method: reverse.",
    no_args_is_help=False,
)
OutputDir = Annotated[Path, typer.Option(help="Everything is written here; run again to resume.")]
KeepStale = Annotated[
    bool, typer.Option("--keep-stale", help="Go on with stages that another version finished.")
]


@app.callback(invoke_without_command=True)
def default(context: typer.Context, output_dir: OutputDir = Path("runs/demo"), seed: Seed = 0) -> None:
    if context.invoked_subcommand is None:
        reverse(output_dir, seed)


@app.command()
def reverse(
    output_dir: OutputDir = Path("runs/demo"),
    seed: Seed = 0,
    scenes: Annotated[int, typer.Option(help="Test scenes to evaluate on.", min=20, max=500)] = 400,
    on_policy: Annotated[
        bool,
        typer.Option("--on-policy", help="Also train on the base's own graded captions and measure that."),
    ] = False,
    steps: Annotated[int | None, typer.Option(help="Training steps; default: the recipe's.", min=1)] = None,
    keep_stale: KeepStale = False,
) -> None:
    """Train the pocket VLM to verify its own phrases, decode with retrospective resampling, and measure both."""
    from ..demos.reverse import run

    run(output_dir, seed=seed, scenes=scenes, on_policy=on_policy, steps=steps, keep_stale=keep_stale)


@app.command()
def tagging(
    output_dir: OutputDir = Path("runs/tagging"),
    seed: Seed = 0,
    scenes: Annotated[int, typer.Option(help="Test scenes to evaluate on.", min=20, max=500)] = 300,
    steps: Annotated[int | None, typer.Option(help="Training steps; default: the recipe's.", min=1)] = None,
    keep_stale: KeepStale = False,
) -> None:
    """Train on rows that `data tag` makes of plain captions, and on exact rows, and measure both."""
    from ..demos.tagging import run

    run(output_dir, seed=seed, scenes=scenes, steps=steps, keep_stale=keep_stale)


@app.command()
def r3v(
    output_dir: OutputDir = Path("runs/demo_r3v"),
    seed: Seed = 0,
    questions: Annotated[
        int | None, typer.Option(help="Test questions; default: 1500, 500 a seed with --reproduce.", min=10)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Training steps of a round; default: its epochs.", min=1)
    ] = None,
    variant: Annotated[
        str, typer.Option(help="full, star, no_refine, no_select, no_iteration, distill, …")
    ] = "full",
    reproduce: Annotated[
        bool, typer.Option("--reproduce", help="All variants with all seeds, into one table.")
    ] = False,
    seeds: Annotated[
        str,
        typer.Option(
            help="Of --reproduce. To use more cores, start one process a seed, then all seeds together for the table."
        ),
    ] = "0,1,2",
    variants: Annotated[
        str, typer.Option(help="Of --reproduce, with commas: full, star, …; default: all.")
    ] = "",
) -> None:
    """Let the pocket VLM learn from its own right and wrong rationales, round after round."""
    from ..demos import r3v as demo_r3v

    if reproduce:
        numbers = whole_numbers("--seeds", seeds)
        given = {"questions": questions} if questions else {}
        if variants:
            given["variants"] = [name.strip() for name in variants.split(",")]
        demo_r3v.reproduce(output_dir, seeds=numbers, steps=steps, **given)
    else:
        demo_r3v.run(output_dir, seed=seed, questions=questions, steps=steps, variant=variant)


@app.command("sc_tune")
def sc_tune(
    output_dir: OutputDir = Path("runs/demo_sc_tune"),
    seed: Seed = 0,
    scenes: Annotated[int, typer.Option(help="Test scenes, some five boxes each.", min=10, max=500)] = 300,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the loop; default: the recipe's.", min=1)
    ] = None,
    keep_stale: Annotated[
        bool, typer.Option("--keep-stale", help="Go on with stages that another version finished.")
    ] = False,
) -> None:
    """Close the loop box, description, box on scenes of twins, and measure what it changed."""
    from ..demos.sc_tune import run

    run(output_dir, seed=seed, scenes=scenes, steps=steps, keep_stale=keep_stale)


@app.command()
def sco(
    output_dir: OutputDir = Path("runs/demo_sco"),
    seed: Seed = 0,
    questions: Annotated[int, typer.Option(help="Test questions.", min=20, max=1500)] = 1500,
    steps: Annotated[int | None, typer.Option(help="Training steps; default: the recipe's.", min=1)] = None,
    keep_stale: Annotated[
        bool, typer.Option("--keep-stale", help="Go on with stages that another version finished.")
    ] = False,
) -> None:
    """Teach the pocket VLM to answer in stages, then to correct its own answers in a second turn, and measure both."""
    from ..demos.sco import run

    run(output_dir, seed=seed, questions=questions, steps=steps, keep_stale=keep_stale)
