"""`vlm-sft-rl self-train RECIPE` and `vlm-sft-rl distill`: self-training in rounds, and the warm-up for R3V's."""

from pathlib import Path
from typing import Annotated

import typer

from ..launch import Machines
from ..self_training.distill import DistillConfig
from .common import NumProcesses, closing, settings_of, show, takes


@takes(machines=settings_of(Machines))
def self_train(
    context: typer.Context,
    recipe: Annotated[
        str,
        typer.Argument(
            help="Name of a recipe, for example r3v/pocket or rewind/pocket_rounds, or path of a YAML file, with "
            "`method: r3v` or `method: rewind`."
        ),
    ],
    accelerate_config: Annotated[
        str,
        typer.Option(
            "--accelerate-config",
            help="How the training is spread: cpu, single_gpu, ddp, fsdp2, zero2, zero3, or path of an accelerate config.",
        ),
    ] = "single_gpu",
    num_processes: NumProcesses = None,
    machines: dict | None = None,
) -> None:
    """Improve a model in rounds of answering and training: from its own right and wrong rationales (R3V), or from what
    its own verifier took back in captions of pictures without labels (rewind).

    Any further `--key value` replaces a key of the recipe. Give the same command again to resume.
    """
    from ..self_train import self_train as run

    place = Machines(**machines)
    run(
        recipe, context.args, accelerate_config=accelerate_config, num_processes=num_processes, machines=place
    )


@takes(config=settings_of(DistillConfig, skip=("dataset",)))
def distill(
    questions: Annotated[Path, typer.Argument(help="Question rows (JSONL).")],
    target: Annotated[
        Path,
        typer.Argument(
            help="JSONL file to write: question rows with a `rationale`, for the key `warmup_file`."
        ),
    ],
    endpoint: Annotated[
        str,
        typer.Option(
            help="Address of the teacher, an OpenAI-compatible endpoint, for example http://localhost:8000/v1."
        ),
    ],
    model: Annotated[str, typer.Option(help="Name of the teacher model at that endpoint.")],
    dataset: Annotated[
        str, typer.Option(help="Data set whose prompts and grader are used, for example pocket or geoqa.")
    ],
    image_root: Annotated[
        Path | None,
        typer.Option(help="Folder that image paths start from. Default: the folder of QUESTIONS."),
    ] = None,
    config: dict | None = None,
) -> None:
    """Collect a teacher's rationales that end in the right answer, to warm up self-training.

    Give the same command again to resume.
    """
    from ..data.images import image_root_of
    from ..io import make_folder
    from ..self_training.distill import distill as run
    from ..teacher import EndpointClient

    make_folder(target.parent)
    settings = DistillConfig(dataset, **config)
    root = image_root_of(questions, image_root)
    ledger = target.with_suffix(".ledger.jsonl")
    with EndpointClient(endpoint, model, ledger=ledger, **settings.client_options()) as client:
        show(run(questions, target, client, settings, image_root=root))
    show(f"Written to {target}")
    closing({"self-train from it": ("self-train", "RECIPE", "--warmup_file", target)})
