"""`vlm-sft-rl correction …`: what correction turns do, asked of models of your own."""

from pathlib import Path
from typing import Annotated

import typer

from ..correction.config import StudyConfig
from .common import ModelDir, Seed, closing, decoder_settings, group, settings_of, show, takes

app = group(
    "Measure self-correction: tasks, harm, turns, kinds of error, cost. Each writes summary.json and report.html."
)
Output = Annotated[Path, typer.Option("--output-dir", help="Where the report goes.")]
Questions = Annotated[Path, typer.Argument(help="Questions with `answer` (JSON or JSONL).")]
Limit = Annotated[int | None, typer.Option(help="Only the first questions.", min=1)]
Batch = Annotated[int, typer.Option(min=1)]


def _written(output_dir: Path) -> None:
    """Say where the study is, and what to type to read it."""
    show(f"Written to {output_dir}")
    closing({"read it": f"open {output_dir / 'report.html'}"})


@app.command()
@takes(settings=decoder_settings(["correct"]))
def tasks(
    specs: Annotated[list[str], typer.Argument(help="Names or paths of eval specs.")],
    model_dir: ModelDir,
    data_dir: Annotated[
        list[Path], typer.Option(help="Folder of the specs' files: one for all, or one each.")
    ],
    output_dir: Output = Path("runs/correction/tasks"),
    limit: Limit = None,
    batch_size: Batch = 16,
    seed: Seed = 0,
    settings: dict | None = None,
) -> None:
    """Every eval spec with corrections, in one report."""
    from ..correction.study import every_task
    from ..evaluation.specs import EvalOptions

    options = EvalOptions(limit=limit, batch_size=batch_size, seed=seed)
    every_task(specs, model_dir, data_dir, output_dir, settings=settings, options=options)
    _written(output_dir)


@app.command()
def declines(
    runs: Annotated[list[Path], typer.Argument(help="Finished folders of `eval run … --decoder correct`.")],
    output_dir: Output = Path("runs/correction/declines"),
    seed: Seed = 0,
) -> None:
    """Where correction makes answers worse: flips by task, category and confidence."""
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
    most: Annotated[int, typer.Option(help="The most corrections.", min=1)] = 3,
    config: dict | None = None,
    settings: dict | None = None,
) -> None:
    """Accuracy after 0 to K corrections; always, self-stopped and oracle stopping."""
    from ..correction.study import turns_and_stops

    turns_and_stops(model_dir, questions, output_dir, StudyConfig(**config), most=most, settings=settings)
    _written(output_dir)


@app.command()
@takes(config=settings_of(StudyConfig))
def errors(
    questions: Annotated[
        Path, typer.Argument(help="Questions with `answer` and the true staged answer in `staged`.")
    ],
    model_dir: ModelDir,
    output_dir: Output = Path("runs/correction/errors"),
    config: dict | None = None,
) -> None:
    """Kinds of error by stage: perception, reasoning, arithmetic, format; by giving the model true stages."""
    from ..correction.study import error_types

    error_types(model_dir, questions, output_dir, StudyConfig(**config))
    _written(output_dir)


@app.command()
def cost(
    systems: Annotated[
        list[str],
        typer.Argument(
            help="NAME=EVAL_RUN or NAME=EVAL_RUN@FOLDER,… (trainings and `data correct` folders); the baseline first."
        ),
    ],
    output_dir: Output = Path("runs/correction/cost"),
    seed: Seed = 0,
) -> None:
    """Tokens, FLOPs and seconds per point gained, of any systems on one benchmark."""
    from ..correction.cost import parse_system
    from ..correction.study import cost_of_points

    cost_of_points([parse_system(text) for text in systems], output_dir, seed=seed)
    _written(output_dir)
