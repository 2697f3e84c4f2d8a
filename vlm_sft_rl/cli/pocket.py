"""`vlm-sft-rl demo …`: each method end to end on the pocket world; `vlm-sft-rl pocket …`: that world and its small VLM."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from .common import Seed, closing, group, show, whole_numbers

app = group("Make the pocket world (small rendered scenes with exact ground truth) and its small model.")
demo = group(
    "Run a method from start to report on the pocket world, on a CPU. Without a method: reverse.",
    no_args_is_help=False,
)
OutputDir = Annotated[
    Path, typer.Option(help="Folder for all results. Give the same command again to resume.")
]
Steps = Annotated[int | None, typer.Option(help="Training steps. Default: those of the recipe.", min=1)]
KeepStale = Annotated[
    bool,
    typer.Option(
        "--keep-stale", help="Use results in the output folder that another version of this package made."
    ),
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
        typer.Option(
            "--on-policy",
            help="Also train on captions of the base model, graded by ground truth, and measure that.",
        ),
    ] = False,
    steps: Steps = None,
    keep_stale: KeepStale = False,
) -> None:
    """REVERSE: train the pocket model to verify its phrases, and measure retrospective resampling (about 10 minutes)."""
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
    """Train REVERSE on rows that `data tag` made of plain captions, and on exact rows, and compare the two."""
    from ..demos.tagging import run

    run(output_dir, seed=seed, scenes=scenes, steps=steps, keep_stale=keep_stale)


@demo.command()
def r3v(
    output_dir: OutputDir = Path("runs/demo_r3v"),
    seed: Seed = 0,
    questions: Annotated[
        int | None,
        typer.Option(help="Test questions. Default: 1500; with --reproduce 500 for each seed.", min=10),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Training steps of a round. Default: the epochs of the recipe.", min=1)
    ] = None,
    variant: Annotated[
        str,
        typer.Option(
            help="Variant of the method: full, star, star_dpo, no_refine, no_select, no_iteration, distill or zero_shot."
        ),
    ] = "full",
    reproduce: Annotated[
        bool, typer.Option("--reproduce", help="Run all variants with all seeds, and write one table.")
    ] = False,
    seeds: Annotated[
        str,
        typer.Option(
            help="With --reproduce: seeds, with commas. To use more cores, start one process for each seed, "
            "then give all seeds for the table."
        ),
    ] = "0,1,2",
    variants: Annotated[
        str, typer.Option(help="With --reproduce: variants, with commas. Default: all.")
    ] = "",
) -> None:
    """R3V: improve the pocket model from its own right and wrong rationales, in two rounds."""
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
    scenes: Annotated[
        int, typer.Option(help="Test scenes, with about five boxes each.", min=10, max=500)
    ] = 300,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the loop; default: the recipe's.", min=1)
    ] = None,
    keep_stale: KeepStale = False,
) -> None:
    """SC-Tune: train the pocket model to describe boxes so that it finds them again, and measure what that changed."""
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
    """LLaVA-SCo: train the pocket model to answer in stages and then to correct its answers, and measure both."""
    from ..demos.sco import run

    run(output_dir, seed=seed, questions=questions, steps=steps, keep_stale=keep_stale)


@app.command()
def build(
    output_dir: Annotated[
        Path, typer.Argument(help="Directory to write the model to. Give the same command again to resume.")
    ],
    seed: Seed = 0,
) -> None:
    """Pre-train the pocket model from random weights (about 20 minutes on two free cores) and measure it."""
    from ..pocket.build import BuildConfig, build_and_measure

    show(build_and_measure(output_dir, BuildConfig(seed=seed)))
    show(f"Written to {output_dir}")
    closing({"prepare it for verification": ("model", "prepare", output_dir, f"{output_dir}-verify")})


@app.command()
def world(
    output_dir: Annotated[Path, typer.Argument(help="Folder to write the files to.")],
    seed: Seed = 0,
) -> None:
    """Write the pocket world: images, captions, questions and exact ground truth."""
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
    output_dir: Annotated[
        Path, typer.Argument(help="Folder for all results. Give the same command again to resume.")
    ],
    seeds: Annotated[int, typer.Option(help="Number of seeds, from 0 on.", min=1)] = 3,
    variants: Annotated[
        str, typer.Option(help="Variants, with commas, for example both,describer_only. Default: all.")
    ] = "",
    scenes: Annotated[int, typer.Option(help="Test scenes to evaluate on.", min=10)] = 300,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the loop; default: the recipe's.", min=1)
    ] = None,
) -> None:
    """Measure what each part of SC-Tune contributes: its variants with several seeds (hours on a CPU)."""
    from ..demos.sc_tune import VARIANTS, reproduce

    names = [name.strip() for name in variants.split(",") if name.strip()] or list(VARIANTS)
    if unknown := [name for name in names if name not in VARIANTS]:
        raise UserError(f"--variants: {unknown[0]!r} is unknown. Known: {', '.join(VARIANTS)}.")
    reproduce(output_dir, seeds=range(seeds), variants=names, scenes=scenes, steps=steps)
    show(f"Written to {output_dir}")
