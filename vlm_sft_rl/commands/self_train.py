"""`vlm-sft-rl self-train RECIPE`: rounds of self-training by reflection."""

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
