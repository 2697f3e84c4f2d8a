"""`vlm-sft-rl self-train RECIPE` and `vlm-sft-rl distill`: self-training by reflection, and the warm-up for it."""

from pathlib import Path
from typing import Annotated

import typer


def self_train(
    context: typer.Context,
    recipe: Annotated[
        str, typer.Argument(help="Recipe name (r3v/pocket) or path of a YAML file with `method: r3v`.")
    ],
    accelerate_config: Annotated[
        str,
        typer.Option("--accelerate-config", help="Name (cpu, single_gpu, ddp, fsdp2, zero2, zero3) or path."),
    ] = "single_gpu",
    num_processes: Annotated[int | None, typer.Option(help="Overrides the accelerate config's.")] = None,
) -> None:
    """Improve a model from its own right and wrong rationales (R3V); run again to go on.

    Any further `--key value` overrides a key of the recipe.
    """
    from ..self_train import self_train as run

    run(recipe, context.args, accelerate_config=accelerate_config, num_processes=num_processes)


def distill(
    questions: Annotated[Path, typer.Argument(help="Question rows (JSONL).")],
    target: Annotated[Path, typer.Argument(help="Warm-up file to write: question rows with a `rationale`.")],
    endpoint: Annotated[str, typer.Option(help="Address of an OpenAI-compatible endpoint.")],
    model: Annotated[str, typer.Option(help="The endpoint's name for the teacher.")],
    dataset: Annotated[str, typer.Option(help="Prompts and grader of this data set.")],
    image_root: Annotated[
        Path | None, typer.Option(help="Folder of the images. [the folder of QUESTIONS]")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many questions, drawn at random.", min=1)] = None,
    n: Annotated[
        int, typer.Option("--n", help="Rationales a question; the first right one is kept.", min=1)
    ] = 1,
    temperature: Annotated[float, typer.Option(help="Above 0 for several rationales.", min=0)] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 384,
    seed: Annotated[int, typer.Option(help="Of the questions drawn, sent along with requests.")] = 0,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with the API key. [OPENAI_API_KEY, if set]")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Requests in flight.", min=1)] = 8,
) -> None:
    """Write a warm-up file: a teacher's rationales that end in the right answer. Run again to go on."""
    from ..data.images import image_root_of
    from ..self_training.distill import distill as run
    from ..teacher import EndpointClient
    from .common import show

    target.parent.mkdir(parents=True, exist_ok=True)
    ledger = target.with_suffix(".ledger.jsonl")
    options = {"ledger": ledger, "api_key_env": api_key_env, "concurrency": concurrency}
    with EndpointClient(endpoint, model, **options) as client:
        show(
            run(
                questions,
                target,
                client,
                dataset=dataset,
                image_root=image_root_of(questions, image_root),
                limit=limit,
                n=n,
                temperature=temperature,
                max_new_tokens=max_new_tokens,
                seed=seed,
            )
        )
