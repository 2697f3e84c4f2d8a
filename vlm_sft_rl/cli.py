"""`vlm-sft-rl`: thin commands. Heavy libraries are imported inside a command, so that `--help` answers at once."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import UserError

HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    name="vlm-sft-rl",
    help="Teach vision-language models to check and correct themselves: data, training, decoding, evaluation.",
    no_args_is_help=True,
    context_settings=HELP,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
data = typer.Typer(
    help="Check, look at and convert training rows.", no_args_is_help=True, context_settings=HELP
)
model = typer.Typer(help="Prepare a checkpoint for training.", no_args_is_help=True, context_settings=HELP)
pocket = typer.Typer(
    help="The embedded world and its small VLM.", no_args_is_help=True, context_settings=HELP
)
app.add_typer(data, name="data")
app.add_typer(model, name="model")
app.add_typer(pocket, name="pocket")


class Decoder(StrEnum):
    greedy = "greedy"
    sample = "sample"
    retrospective = "retrospective"
    drop = "drop"
    stop = "stop"


class Init(StrEnum):
    mean = "mean"
    semantic = "semantic"


ModelDir = Annotated[Path, typer.Option("--model", help="Checkpoint or adapter directory.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]


@app.command()
def demo(
    method: Annotated[str, typer.Argument(help="What to demonstrate: reverse.")] = "reverse",
    output_dir: Annotated[Path, typer.Option(help="Everything is written here; run again to resume.")] = Path(
        "runs/demo"
    ),
    seed: Seed = 0,
    scenes: Annotated[int, typer.Option(help="Test scenes to evaluate on.", min=20, max=500)] = 400,
    on_policy: Annotated[
        bool,
        typer.Option("--on-policy", help="Also train on the base's own graded captions and measure that."),
    ] = False,
    steps: Annotated[int | None, typer.Option(help="Training steps; default: the recipe's.", min=1)] = None,
) -> None:
    """Train the pocket VLM to verify its own phrases, decode with retrospective resampling, and measure both."""
    if method != "reverse":
        raise UserError(f"demo {method}: there is no such demonstration. Available: reverse.")
    from .pocket.demo_reverse import run

    run(output_dir, seed=seed, scenes=scenes, on_policy=on_policy, steps=steps)


@app.command(context_settings={**HELP, "allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="Recipe name (reverse/pocket) or path of a YAML file.")],
    accelerate_config: Annotated[
        str,
        typer.Option("--accelerate-config", help="Name (cpu, single_gpu, ddp, fsdp2, zero2, zero3) or path."),
    ] = "single_gpu",
    num_processes: Annotated[int | None, typer.Option(help="Overrides the accelerate config's.")] = None,
) -> None:
    """Run a recipe through `accelerate launch`. Any further `--key value` overrides a key of the recipe."""
    from .launch import launch_training

    raise typer.Exit(launch_training(recipe, context.args, accelerate_config, num_processes))


@app.command()
def generate(
    model_dir: ModelDir,
    prompt: Annotated[str, typer.Option(help="The question.")],
    image: Annotated[list[Path] | None, typer.Option(help="Picture; repeat for several.")] = None,
    decoder: Annotated[
        Decoder, typer.Option(help="greedy, sample or retrospective.")
    ] = Decoder.retrospective,
    threshold: Annotated[
        float | None, typer.Option(help="τ on P(</UN>); default: the checkpoint's own.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Starting temperature.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 512,
    seed: Seed = 0,
    trace: Annotated[Path | None, typer.Option(help="Write the answer's history to this HTML page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole answer as JSON.")] = False,
) -> None:
    """Answer one question about a picture, checking each phrase on the way."""
    from .generate import answer_one

    answer_one(
        model_dir,
        prompt,
        image or [],
        decoder=decoder.value,
        threshold=threshold,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        trace=trace,
        as_json=as_json,
    )


@app.command("eval")
def evaluate(
    what: Annotated[
        list[str],
        typer.Argument(help="A spec's name or path, or: compare RUN_A RUN_B.", metavar="SPEC | compare A B"),
    ],
    model_dir: Annotated[
        Path | None, typer.Option("--model", help="Checkpoint or adapter directory.")
    ] = None,
    data_dir: Annotated[Path, typer.Option(help="Folder that the spec's files are in.")] = Path("."),
    decoder: Annotated[Decoder, typer.Option(help="How answers are made.")] = Decoder.greedy,
    threshold: Annotated[
        float | None, typer.Option(help="τ on P(</UN>); default: the spec's or checkpoint's.")
    ] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Default: runs/eval/SPEC-MODEL-DECODER.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first questions.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    temperature: Annotated[float | None, typer.Option(help="For --decoder sample.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    rounds: Annotated[int, typer.Option(help="Bootstrap rounds.", min=10)] = 100,
    seed: Seed = 0,
    greedy_run: Annotated[
        Path | None, typer.Option(help="For drop and stop: derive from this finished greedy run.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option(help="Throw away what another configuration left there.")
    ] = False,
) -> None:
    """Measure a model on a benchmark, or compare two finished runs question by question."""
    if what[0] == "compare":
        if len(what) != 3:
            raise UserError("eval compare needs two run folders: vlm-sft-rl eval compare RUN_A RUN_B")
        from rich.console import Console

        from .evaluation.compare import compare
        from .evaluation.tables import comparison_table

        Console().print(comparison_table(compare(what[1], what[2], seed=seed)))
        return
    if len(what) != 1:
        raise UserError(f"eval takes one spec, found {len(what)}: {' '.join(what)}.")
    if model_dir is None:
        raise UserError("eval needs --model DIR (a checkpoint or adapter directory).")
    from .evaluation.runner import evaluate_spec

    default = Path("runs/eval") / f"{Path(what[0]).stem}-{model_dir.resolve().name}-{decoder.value}"
    evaluate_spec(
        what[0],
        model_dir,
        decoder=decoder.value,
        output_dir=output_dir or default,
        data_dir=data_dir,
        limit=limit,
        seed=seed,
        batch_size=batch_size,
        threshold=threshold,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        rounds=rounds,
        greedy_run=greedy_run,
        overwrite=overwrite,
    )


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="Adapter directory.")],
    output_dir: Annotated[Path, typer.Argument(help="Where the standalone checkpoint goes.")],
    base: Annotated[
        Path | None, typer.Option(help="The base model, if it is no longer where it was.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (the base's own), bfloat16, float16 or float32.")] = "auto",
) -> None:
    """Merge an adapter into its base, reload the result, and prove that the adapter took effect."""
    from .models.merge import merge as merge_adapter

    _print(merge_adapter(adapter, output_dir, base=base, dtype=dtype))


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="decoding, sft or reader.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Run a speed benchmark: ratios measured side by side in one run."""
    from .benchmarks import run

    _print(run(name, json_file))


@data.command()
def validate(
    rows: Annotated[Path, typer.Argument(help="Training rows (JSON or JSONL).")],
    model_dir: Annotated[
        Path | None, typer.Option("--model", help="Check tokens with this processor too.")
    ] = None,
    image_root: Annotated[Path | None, typer.Option(help="Folder that image paths are relative to.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest row allowed, in tokens.", min=1)] = None,
) -> None:
    """Predict what training would trip over; exits with status 1 if anything is wrong."""
    from rich.console import Console

    from .data.validate import validate as check

    report = check(rows, processor_or_path=model_dir, image_root=image_root, max_length=max_length)
    Console().print(report)
    raise typer.Exit(0 if report.ok else 1)


@data.command()
def preview(
    rows: Annotated[Path, typer.Argument(help="Training rows (JSON or JSONL).")],
    model_dir: ModelDir,
    row: Annotated[str, typer.Option(help="Position from 0, or a row's id.")] = "0",
    image_root: Annotated[Path | None, typer.Option(help="Folder that image paths are relative to.")] = None,
) -> None:
    """Show every token of one row with its role, mask and weight."""
    from .data.preview import preview_file

    preview_file(rows, model_dir, row=row, image_root=image_root)


@data.command()
def convert(
    source: Annotated[Path, typer.Argument(help="LLaVA JSON, the published tagged set, or TRL rows.")],
    target: Annotated[Path, typer.Argument(help="JSONL file of rows to write.")],
    source_format: Annotated[str, typer.Option("--format", help="llava, reverse or trl.")] = "llava",
) -> None:
    """Convert a source file to rows, streamed."""
    from .data.convert import convert as convert_file

    _print(convert_file(source, target, format=source_format))


@model.command()
def prepare(
    source: Annotated[Path, typer.Argument(help="Any Hugging Face VLM directory.")],
    target: Annotated[Path, typer.Argument(help="Where the prepared checkpoint goes.")],
    init: Annotated[Init, typer.Option(help="How the new rows start.")] = Init.mean,
) -> None:
    """Add the three verification tokens to a VLM and save it as an ordinary directory."""
    from .models.prepare import prepare as prepare_model

    _print(prepare_model(source, target, init=init.value))


@pocket.command()
def build(
    output_dir: Annotated[Path, typer.Argument(help="Where the model goes; run again to resume.")],
    seed: Seed = 0,
) -> None:
    """Pre-train the pocket VLM from nothing (some twenty minutes on two free cores) and measure it."""
    from .pocket.build import BuildConfig, build_and_measure

    _print(build_and_measure(output_dir, BuildConfig(seed=seed)))


@pocket.command()
def world(
    output_dir: Annotated[Path, typer.Argument(help="Where the files go.")],
    seed: Seed = 0,
) -> None:
    """Write the pocket world to disk: images, captions, questions, exact ground truth."""
    from .pocket.dataset import build_world

    _print(build_world(output_dir, seed=seed))


def _print(value: Any) -> None:
    from rich.console import Console

    if value is not None:
        Console().print(value if not isinstance(value, Path | str) else _escape(str(value)))


def main() -> None:
    """Entry point: an error meant for the user is one message and status 2, never a traceback."""
    try:
        app()
    except UserError as error:
        from rich.console import Console

        message = f"[bold red]Error:[/] {_escape(str(error))}"
        Console(stderr=True).print(message, highlight=False, soft_wrap=True)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == 130:
            print("Interrupted. Run the same command again to go on from here.", file=sys.stderr)
        raise


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    main()
