"""`vlm-sft-rl demo …`: each method end to end on the pocket world; `vlm-sft-rl pocket …`: that world and its small VLM."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from .common import Seed, closing, group, show, whole_numbers

app = group("The embedded world and its small VLM.")
demo = group(
    "Watch a method at work on the pocket world, from base weights to a report. Without a method: reverse.",
    no_args_is_help=False,
)
OutputDir = Annotated[Path, typer.Option(help="Everything is written here; run again to resume.")]
Steps = Annotated[int | None, typer.Option(help="Training steps; default: the recipe's.", min=1)]
KeepStale = Annotated[
    bool, typer.Option("--keep-stale", help="Go on with stages that another version finished.")
]


@demo.callback(invoke_without_command=True)
def default(context: typer.Context, output_dir: OutputDir = Path("runs/demo"), seed: Seed = 0) -> None:
    if context.invoked_subcommand is None:
        reverse(output_dir, seed)


@demo.command()
def reverse(
    output_dir: OutputDir = Path("runs/demo"),
    seed: Seed = 0,
    scenes: Annotated[int, typer.Option(help="Test scenes to evaluate on.", min=20, max=500)] = 400,
    on_policy: Annotated[
        bool,
        typer.Option("--on-policy", help="Also train on the base's own graded captions and measure that."),
    ] = False,
    steps: Steps = None,
    keep_stale: KeepStale = False,
) -> None:
    """Train the pocket VLM to verify its own phrases, decode with retrospective resampling, and measure both."""
    from ..demos.reverse import run

    run(output_dir, seed=seed, scenes=scenes, on_policy=on_policy, steps=steps, keep_stale=keep_stale)


@demo.command()
def tagging(
    output_dir: OutputDir = Path("runs/tagging"),
    seed: Seed = 0,
    scenes: Annotated[int, typer.Option(help="Test scenes to evaluate on.", min=20, max=500)] = 300,
    steps: Steps = None,
    keep_stale: KeepStale = False,
) -> None:
    """Train on rows that `data tag` makes of plain captions, and on exact rows, and measure both."""
    from ..demos.tagging import run

    run(output_dir, seed=seed, scenes=scenes, steps=steps, keep_stale=keep_stale)


@demo.command()
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
        options = {"questions": questions} if questions else {}
        if variants:
            options["variants"] = [name.strip() for name in variants.split(",")]
        demo_r3v.reproduce(output_dir, seeds=numbers, steps=steps, **options)
    else:
        demo_r3v.run(output_dir, seed=seed, questions=questions, steps=steps, variant=variant)


@demo.command("sc_tune")
def sc_tune(
    output_dir: OutputDir = Path("runs/demo_sc_tune"),
    seed: Seed = 0,
    scenes: Annotated[int, typer.Option(help="Test scenes, some five boxes each.", min=10, max=500)] = 300,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the loop; default: the recipe's.", min=1)
    ] = None,
    keep_stale: KeepStale = False,
) -> None:
    """Close the loop box, description, box on scenes of twins, and measure what it changed."""
    from ..demos.sc_tune import run

    run(output_dir, seed=seed, scenes=scenes, steps=steps, keep_stale=keep_stale)


@demo.command()
def sco(
    output_dir: OutputDir = Path("runs/demo_sco"),
    seed: Seed = 0,
    questions: Annotated[int, typer.Option(help="Test questions.", min=20, max=1500)] = 1500,
    steps: Steps = None,
    keep_stale: KeepStale = False,
) -> None:
    """Teach the pocket VLM to answer in stages, then to correct its own answers in a second turn, and measure both."""
    from ..demos.sco import run

    run(output_dir, seed=seed, questions=questions, steps=steps, keep_stale=keep_stale)


@app.command()
def build(
    output_dir: Annotated[Path, typer.Argument(help="Where the model goes; run again to resume.")],
    seed: Seed = 0,
) -> None:
    """Pre-train the pocket VLM from nothing (some twenty minutes on two free cores) and measure it."""
    from ..pocket.build import BuildConfig, build_and_measure

    show(build_and_measure(output_dir, BuildConfig(seed=seed)))
    show(f"Written to {output_dir}")
    closing({"prepare it for verification": ("model", "prepare", output_dir, f"{output_dir}-verify")})


@app.command()
def world(
    output_dir: Annotated[Path, typer.Argument(help="Where the files go.")],
    seed: Seed = 0,
) -> None:
    """Write the pocket world to disk: images, captions, questions, exact ground truth."""
    from ..pocket.dataset import build_world

    folder = build_world(output_dir, seed=seed)
    show(f"Written to {folder}")
    closing(
        {
            "make tagged rows of it": (
                *("data", "synthetic", folder / "train_captions.json", folder / "objects.jsonl"),
                "rows.jsonl",
            )
        }
    )


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
    from ..demos.sc_tune import VARIANTS, reproduce

    names = [name.strip() for name in variants.split(",") if name.strip()] or list(VARIANTS)
    if unknown := [name for name in names if name not in VARIANTS]:
        raise UserError(f"--variants: {unknown[0]!r} is unknown. Known: {', '.join(VARIANTS)}.")
    reproduce(output_dir, seeds=range(seeds), variants=names, scenes=scenes, steps=steps)
    show(f"Written to {output_dir}")
