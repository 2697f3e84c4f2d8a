"""`train … --dry-run`: everything that can be known before the first step, without a weight in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from .models.lora import trainable_rows
from .models.memory import STRATEGIES, Estimate, estimate, facts, gib
from .models.parts import unwrap
from .models.report import print_report, startup_report
from .models.tokens import row_count
from .trainers.checks import check_first_rows, check_trains


@dataclass(frozen=True)
class Plan:
    """What a method's `plan()` returns: what its `build()` would make, with the model on the meta device.

    Attributes:
        extra: fields of `memory.Facts` that the method decides.
        refused: strategies that the method refuses, each with its reason.
        notes: what the estimate leaves out, one sentence each.
        rows_per_pass: sequences that a pass of training holds per row of `per_device_train_batch_size`.
        least_supervised: tokens with loss that a sequence may have beside those that the collator shows.
    """

    model: Any
    processor: Any
    rows: Any
    collator: Any
    extra: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    rows_per_pass: int = 1
    least_supervised: int = 0


def dry_run_report(method, recipe: dict, model_args, data_args, args, *, gpus: int, console: Console) -> dict:
    """Check settings, tokens and the first rows; print the start-up report and the memory estimate.

    Args:
        method: see `train.load_method`; with `plan()`.
        gpus: how many GPUs the estimate is for.

    Returns:
        The report, with `memory`: `{strategy: Estimate}`.

    Raises UserError: what would stop the real run before its first step.
    """
    on_gpu, checkpointing = not args.use_cpu, args.gradient_checkpointing
    if model_args.dtype == "auto":  # for the machine that the run is meant for, not for this one
        dtype = "bfloat16" if on_gpu and model_args.use_peft else "float32"
        model_args = replace(model_args, dtype=dtype)
    plan = method.plan(recipe, model_args, data_args, args)
    check_trains(plan.model)
    vocabulary = row_count(unwrap(plan.model).get_input_embeddings().weight)
    check_first_rows(plan.rows, plan.collator, vocabulary)
    report = startup_report(plan.model, plan.processor, plan.rows, plan.collator)
    print_report(report, console)

    batch = args.per_device_train_batch_size * plan.rows_per_pass
    supervised = max(report["supervised_tokens"], plan.least_supervised)
    counted = facts(
        plan.model,
        model_args,
        batch,
        report["longest_row"],
        round(batch * supervised),
        mixed_precision=on_gpu,
    )
    counted = replace(counted, **plan.extra)
    options = {"optimizer": args.optim, "mixed_precision": on_gpu}
    memory = {
        name: estimate(counted, strategy, gpus, checkpointing=checkpointing, **options)
        for name, strategy in STRATEGIES.items()
        if gpus != 1 or name == "ddp"
    }
    console.print(memory_table(memory, gpus))
    console.print(
        f"For {batch} row{'s' * (batch > 1)} of {report['longest_row']} tokens, the longest of the first "
        f"{report['rows_measured']}; longer rows need more. The CUDA context and the allocator add 1-2 GiB."
    )
    console.print(
        f"Activations are {gib(memory['ddp'].activations)} GiB with gradient checkpointing "
        f"{'on' if checkpointing else 'off'}, and would be {gib(memory['ddp'].activations_otherwise)} GiB with it "
        f"{'off' if checkpointing else 'on'}."
    )
    for note in memory["ddp"].notes:
        console.print(f"{note}.")
    for note in plan.notes:
        console.print(note)

    refused = {}
    if gpus > 1:
        if trainable_rows(plan.model):
            cut = "LoRA with trainable token rows reads rows that it cuts apart (`train_new_tokens: false` lifts it)."
            refused |= {"zero3": cut, "fsdp2": cut}
        refused |= plan.refused
    for name, reason in refused.items():
        console.print(f"{name} is refused for this recipe: {reason}")
    return report | {"memory": memory, "refused": refused}


def memory_table(memory: Mapping[str, Estimate], gpus: int) -> Table:
    """GiB per GPU, one row a strategy."""
    table = Table(
        title=f"Estimated memory per GPU in GiB, {gpus} GPU{'s' * (gpus > 1)}", title_justify="left"
    )
    table.add_column("config")
    columns = ("weights", "gradients", "optimizer", "activations", "working")
    for column in (*columns, "total"):
        table.add_column(column, justify="right")
    for name, needs in memory.items():
        label = "single_gpu" if name == "ddp" and gpus == 1 else name
        table.add_row(
            label, *(gib(getattr(needs, column)) for column in columns), f"[bold]{gib(needs.total)}[/]"
        )
    return table
