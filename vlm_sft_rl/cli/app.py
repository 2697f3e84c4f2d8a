"""`vlm-sft-rl`: thin commands. Heavy libraries are imported inside a command, so that `--help` answers at once."""

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from .. import __version__
from ..errors import UserError, missing_package
from ..io import NO_ACCESS
from ..launch import Machines, end_with_parent, launch_training, process_count
from ..serving.config import ServeConfig
from . import correction, data, eval, model, pocket, recipes
from .certify import certify
from .common import (
    ALONE,
    DecoderName,
    EngineName,
    ModelDir,
    NumProcesses,
    Seed,
    alone_settings,
    closing,
    escape,
    settings_of,
    show,
    takes,
)
from .decode import decode
from .self_train import distill, self_train

HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    name="vlm-sft-rl",
    help="Teach vision-language models to check and correct themselves: data, training, decoding, evaluation.",
    no_args_is_help=True,
    context_settings=HELP,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(pocket.demo, name="demo")


def say_version(wanted: bool) -> None:
    if wanted:
        print(f"vlm-sft-rl {__version__}")
        raise typer.Exit


@app.callback()
def everywhere(
    version: Annotated[
        bool,
        typer.Option("--version", callback=say_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


@app.command(context_settings={**HELP, "allow_extra_args": True, "ignore_unknown_options": True})
@takes(machines=settings_of(Machines))
def train(
    context: typer.Context,
    recipe: Annotated[
        str, typer.Argument(help="Name of a recipe, for example reverse/pocket, or path of a YAML file.")
    ],
    accelerate_config: Annotated[
        str,
        typer.Option(
            "--accelerate-config",
            help="How the training is spread: cpu, single_gpu, ddp, fsdp2, zero2, zero3, or path of an accelerate config.",
        ),
    ] = "single_gpu",
    num_processes: NumProcesses = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check recipe and data and estimate the memory per GPU, without loading or training a model.",
        ),
    ] = False,
    machines: dict | None = None,
) -> None:
    """Train a model by a recipe. Any further `--key value` replaces a key of the recipe.

    For example: `vlm-sft-rl train reverse/qwen2_5_vl_3b_lora --train_file rows.jsonl --learning_rate 1e-5 --dry-run`.
    `recipes ls` lists the recipes, `recipes show NAME` prints the keys of one. The run goes through `accelerate launch`.
    """
    place = Machines(**machines)
    if dry_run:
        from ..train import main as run_training

        gpus = process_count(accelerate_config, num_processes, place)
        raise typer.Exit(run_training(["--config", recipe, "--dry-run", "--gpus", str(gpus), *context.args]))

    raise typer.Exit(launch_training(recipe, context.args, accelerate_config, num_processes, place))


app.command(
    "self-train", context_settings={**HELP, "allow_extra_args": True, "ignore_unknown_options": True}
)(self_train)


app.command()(distill)


app.command()(decode)


app.command()(certify)


@app.command()
@takes(settings=settings_of(ServeConfig))
def serve(
    model: Annotated[
        str,
        typer.Argument(
            help="Checkpoint or adapter directory, or `pocket` for the small model that is shipped."
        ),
    ],
    settings: dict | None = None,
) -> None:
    """Serve a model through an OpenAI-compatible API and a web page. Phrases are streamed once they are verified."""
    from .serve import serve_model

    serve_model(model, settings)


@app.command()
def view(
    folder: Annotated[
        Path,
        typer.Argument(help="Folder with the runs; those in its subfolders are listed too.", metavar="DIR"),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)
    ] = 8001,
) -> None:
    """Show all evaluations and self-training runs below a folder on a web page, to sort, filter, compare and open them."""
    from .serve import view_runs

    view_runs(folder, host, port)


@app.command()
@takes(settings=alone_settings())
def generate(
    model_dir: ModelDir,
    prompt: Annotated[str, typer.Option(help="The question.")],
    image: Annotated[
        list[Path] | None, typer.Option(help="Path of an image. Repeat the option for several images.")
    ] = None,
    decoder: Annotated[
        DecoderName,
        # the others are refused with the reason
        typer.Option(
            help="How the answer is decoded; `eval ls` describes each way.", metavar="|".join(ALONE)
        ),
    ] = DecoderName.retrospective,
    engine: Annotated[
        EngineName, typer.Option(help="Library that runs the model: hf (transformers) or vllm.")
    ] = EngineName.hf,
    seed: Seed = 0,
    trace: Annotated[
        Path | None, typer.Option(help="HTML file to write: which phrases were rejected and decoded again.")
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print the answer with its phrases, probabilities and counts as JSON."),
    ] = False,
    settings: dict | None = None,
) -> None:
    """Answer one question about an image, checking each phrase while it is written."""
    from .model import answer_one

    answer_one(
        model_dir,
        prompt,
        image or [],
        decoder.value,
        settings,
        seed=seed,
        engine=engine.value,
        trace=trace,
        as_json=as_json,
    )


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="Directory of the LoRA adapter.")],
    output_dir: Annotated[Path, typer.Argument(help="Directory to write the merged checkpoint to.")],
    base: Annotated[
        Path | None, typer.Option(help="Directory of the base model, if it has moved since the training.")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="Number type of the merged weights: auto (that of the base), bfloat16, float16 or float32."
        ),
    ] = "auto",
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload the result to the Hub under this name.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push-to-hub: create a private repository.")
    ] = False,
) -> None:
    """Merge an adapter into its base model, and check on the reloaded result that it took effect."""
    from ..models.card import push
    from ..models.checkpoints import merge as merge_adapter

    report = merge_adapter(adapter, output_dir, base=base, dtype=dtype, name=push_to_hub)
    show(
        f"Written to {report.path}, {report.dtype}. Logits of a probe: training changed them by {report.effect:.2%}, "
        f"merging by {report.error:.2%}; rounding explains up to {report.tolerance:.2%}."
    )
    if push_to_hub:
        show(f"Uploaded to {push(output_dir, push_to_hub, private=private)}")
    closing({"ask it": ("generate", "--model", output_dir, "--image", "PICTURE", "--prompt", "QUESTION")})


@app.command()
def env() -> None:
    """Print the versions, devices and settings that a bug report needs."""
    from .environment import print_environment

    print_environment()


app.add_typer(correction.app, name="correction")
app.add_typer(data.app, name="data")
app.add_typer(eval.app, name="eval")
app.add_typer(model.app, name="model")
app.add_typer(pocket.app, name="pocket")
app.add_typer(recipes.app, name="recipes")


def main() -> None:
    """Entry point: an error meant for the user is one message and status 2, never a traceback."""
    # on a CPU it recommends a package for inference each time it is imported
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    end_with_parent()  # where accelerate started it
    try:
        app()
    except (UserError, OSError, ImportError) as error:
        if isinstance(error, ImportError):
            error = missing_package(error)
        if isinstance(error, OSError):  # of a path that was given: too long, a loop of links, not allowed
            if error.filename is None or error.errno not in NO_ACCESS:
                raise
            error = UserError(f"{error.filename!r}: cannot be used ({error.strerror}). Check the path.")
        from rich.console import Console

        message = f"[bold red]Error:[/] {escape(str(error))}"
        Console(stderr=True).print(message, highlight=False, soft_wrap=True)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == 130:
            print("Interrupted. Run the same command again to go on from here.", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
