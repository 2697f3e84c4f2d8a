"""`vlm-sft-rl correction …`: what correction turns do, asked of models of your own."""

from pathlib import Path
from typing import Annotated

import typer

from ..correction.config import StudyConfig
from .common import ModelDir, Seed, closing, decoder_settings, group, settings_of, show, takes

app = group(
    "Measure what self-correction does for a model. Each command writes summary.json and report.html."
)
Output = Annotated[Path, typer.Option("--output-dir", help="Folder for the report.")]
Questions = Annotated[Path, typer.Argument(help="Question rows with `answer` (JSON or JSONL).")]
Limit = Annotated[int | None, typer.Option(help="Answer only the first N questions. Default: all.", min=1)]
Batch = Annotated[int, typer.Option(help="Answers decoded side by side.", min=1)]


def _written(output_dir: Path) -> None:
    """Say where the study is, and what to type to read it."""
    show(f"Written to {output_dir}")
    closing({"read it": f"open {output_dir / 'report.html'}"})


@app.command()
@takes(settings=decoder_settings(["correct"]))
def tasks(
    specs: Annotated[list[str], typer.Argument(help="Names of benchmarks, or paths of eval specs.")],
    model_dir: ModelDir,
    data_dir: Annotated[
        list[Path],
        typer.Option(
            help="Folder of the benchmark's files: one for all benchmarks, or the option once for each."
        ),
    ],
    output_dir: Output = Path("runs/correction/tasks"),
    limit: Limit = None,
    batch_size: Batch = 16,
    seed: Seed = 0,
    settings: dict | None = None,
) -> None:
    """Measure accuracy with and without corrections on several benchmarks, in one report."""
    from ..correction.study import every_task
    from ..evaluation.specs import EvalOptions

    options = EvalOptions(limit=limit, batch_size=batch_size, seed=seed)
    every_task(specs, model_dir, data_dir, output_dir, settings=settings, options=options)
    _written(output_dir)


@app.command()
def declines(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of `eval run … --decoder correct`.")],
    output_dir: Output = Path("runs/correction/declines"),
    seed: Seed = 0,
) -> None:
    """Show where corrections make answers worse: changed answers by benchmark, category and confidence."""
    from ..correction.study import where_it_declines

    where_it_declines(runs, output_dir, seed=seed)
    _written(output_dir)


@app.command()
@takes(
    config=settings_of(StudyConfig),
    settings=[
        setting
        for setting in decoder_settings(["correct"])
        if setting.key not in ("corrections", "stop", "confidence", "max_new_tokens")
    ],
)
def turns(
    questions: Questions,
    model_dir: ModelDir,
    output_dir: Output = Path("runs/correction/turns"),
    most: Annotated[int, typer.Option(help="Most corrections of an answer.", min=1)] = 3,
    config: dict | None = None,
    settings: dict | None = None,
) -> None:
    """Measure accuracy after each correction, and with different rules for when to stop."""
    from ..correction.study import turns_and_stops

    turns_and_stops(model_dir, questions, output_dir, StudyConfig(**config), most=most, settings=settings)
    _written(output_dir)


@app.command()
@takes(config=settings_of(StudyConfig))
def errors(
    questions: Annotated[
        Path,
        typer.Argument(
            help="Question rows with `answer`, and the true staged answer in `staged` (JSON or JSONL)."
        ),
    ],
    model_dir: ModelDir,
    output_dir: Output = Path("runs/correction/errors"),
    config: dict | None = None,
) -> None:
    """Find out in which stage errors arise (perception, reasoning, arithmetic, format), by giving the model true stages."""
    from ..correction.study import error_types

    error_types(model_dir, questions, output_dir, StudyConfig(**config))
    _written(output_dir)


@app.command()
def cost(
    systems: Annotated[
        list[str],
        typer.Argument(
            help="NAME=RUN or NAME=RUN@FOLDER,…, the baseline first. RUN: output folder of `eval run`. FOLDER: "
            "of the trainings and of `data correct` that led to the model."
        ),
    ],
    output_dir: Output = Path("runs/correction/cost"),
    seed: Seed = 0,
) -> None:
    """Compute what a point of accuracy cost in tokens, FLOPs and seconds, for systems measured on one benchmark."""
    from ..correction.cost import parse_system
    from ..correction.study import cost_of_points

    cost_of_points([parse_system(text) for text in systems], output_dir, seed=seed)
    _written(output_dir)
