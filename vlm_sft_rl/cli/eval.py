"""`vlm-sft-rl eval …`: measure a model on a benchmark, compare two runs, write figures into a model card."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..errors import UserError
from ..evaluation.decoders import DECODERS
from ..evaluation.specs import (
    EvalOptions,
    JudgeSettings,
    load_spec,
    with_categories,
    with_metric_options,
)
from ..recipes import names
from ..workers import Workers, workers_of
from .common import (
    ALONE,
    DecoderName,
    ModelDir,
    Seed,
    closing,
    decoder_settings,
    group,
    settings_of,
    show,
    takes,
)

app = group("Measure models on benchmarks, compare runs, and write their figures into a model card.")
BENCHMARKS = [name for name in names("eval") if "/" not in name]
Run = Annotated[Path, typer.Argument(help="Output folder of `eval run`.")]


@app.command(
    epilog=f"Benchmarks: {', '.join(BENCHMARKS)}.\n\nFor example: `vlm-sft-rl eval run pocket_captions --model MODEL_DIR "
    "--data-dir DIR`."
)
@takes(
    options=settings_of(EvalOptions, skip=("report", "device", "dtype")),
    judge=settings_of(JudgeSettings, prefix="judge_"),
    cluster=settings_of(Workers),
    settings=decoder_settings(),
)
def run(
    spec: Annotated[str, typer.Argument(help="Name of a benchmark, or path of an eval spec.")],
    model_dir: ModelDir,
    data_dir: Annotated[Path, typer.Option(help="Folder of the benchmark's files.")] = Path("."),
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder for the results. Default: runs/eval/SPEC-MODEL-DECODER.")
    ] = None,
    decoder: Annotated[
        DecoderName, typer.Option(help="How answers are decoded; `eval ls` describes each way.")
    ] = DecoderName.greedy,
    metric_option: Annotated[
        list[str] | None,
        typer.Option(
            help="KEY=VALUE that replaces one of the spec's metric_options, for example rules=released. Repeat "
            "the option for several."
        ),
    ] = None,
    category: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this category or question file of the benchmark, for example refcoco_val. Repeat the "
            "option for several."
        ),
    ] = None,
    options: dict | None = None,
    judge: dict | None = None,
    cluster: dict | None = None,
    settings: dict | None = None,
) -> None:
    """Measure a model on a benchmark. Give the same command again to resume after an interruption.

    Decoding options that are not given come from the eval spec or the checkpoint.
    """
    from ..evaluation.runner import evaluate_spec

    if judge and not {"url", "model"} <= judge.keys():
        raise UserError(
            "--judge-url and --judge-model go together: the endpoint, and the model's name there."
        )
    folder = f"{Path(spec).stem}-{model_dir.resolve().name}-{decoder.value}"
    output = output_dir or Path("runs/eval") / folder
    evaluate_spec(
        with_categories(with_metric_options(load_spec(spec), metric_option or []), category or []),
        model_dir,
        output_dir=output,
        data_dir=data_dir,
        decoder=decoder.value,
        settings=settings,
        options=EvalOptions(**options),
        judge=JudgeSettings(**judge) if judge else None,
        workers=workers_of(cluster),
    )
    closing(
        {
            "compare it with another run": ("eval", "compare", output, "OLDER_RUN"),
            "put its figures into the model's card": (
                "eval",
                "card",
                output,
                "--readme",
                model_dir / "README.md",
            ),
        }
    )


@app.command()
def compare(
    new: Run,
    old: Run,
    rounds: Annotated[int, typer.Option(help="Bootstrap rounds of the intervals.", min=10)] = 1000,
    seed: Seed = 0,
    html: Annotated[
        Path | None,
        typer.Option(help="HTML file to write: differences, and the answers of both runs side by side."),
    ] = None,
) -> None:
    """Compare two finished runs of one benchmark question by question: the differences are new minus old."""
    from ..evaluation.compare import comparison_table, pair_runs, write_comparison

    pairs = pair_runs(new, old, seed=seed, rounds=rounds)
    Console().print(comparison_table(pairs.result).terminal())
    if html is not None:
        show(f"Written to {write_comparison(html, pairs)}")
    else:
        words = ("eval", "compare", new, old, "--html", "comparison.html")
        closing({"see the questions that differ": words})


@app.command()
def card(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of `eval run`.", metavar="RUN …")],
    readme: Annotated[Path, typer.Option(help="Model card to write into, for example MODEL_DIR/README.md.")],
) -> None:
    """Write the figures of finished runs, with their intervals, into a model card."""
    from ..evaluation.pages import update_card

    show(f"Written to {update_card(readme, runs)}")
    closing({"publish the model": f"hf upload OWNER/NAME {readme.parent}"})


@app.command()
def ls() -> None:
    """List all benchmarks and decoders."""
    for title, lines in (
        ("Benchmarks", {name: load_spec(name).description for name in BENCHMARKS}),
        (
            "Decoders",
            {n: e.help if n in ALONE else f"{e.help}; not in `generate`" for n, e in DECODERS.items()},
        ),
    ):
        table = Table(title=title, show_header=False, title_justify="left")
        for name, text in lines.items():
            table.add_row(name, text)
        Console().print(table, markup=False)
    words = "eval run BENCHMARK --model MODEL_DIR --data-dir DIR --decoder DECODER"
    closing({"measure a model": words.split(), "see which files a benchmark reads": "docs/benchmarks.md"})
