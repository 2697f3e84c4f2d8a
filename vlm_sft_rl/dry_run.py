"""`train … --dry-run`: everything that can be known before the first step, without a weight in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console
from rich.table import Table

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


def planned_dtype(model_args, *, on_gpu: bool):
    """The model settings with `dtype: auto` resolved for the machine that the run is meant for, not for this one."""
    if model_args.dtype != "auto":
        return model_args
    return replace(model_args, dtype="bfloat16" if on_gpu and model_args.use_peft else "float32")


def rehearse(module, recipe: dict, model_args, data_args, args, *, gpus: int, console: Console) -> dict:
    """Check settings, tokens and the first rows; print the start-up report and the memory estimate.

    Args:
        module: the method's module, with `plan()`.
        gpus: how many GPUs the estimate is for.

    Returns:
        The report, with `memory`: `{strategy: Estimate}`.

    Raises:
        UserError: what would stop the real run before its first step.
    """
    on_gpu = not args.use_cpu
    model_args = planned_dtype(model_args, on_gpu=on_gpu)
    plan = module.plan(recipe, model_args, data_args, args)
    check_trains(plan.model)
    plain = unwrap(plan.model)
    check_first_rows(plan.rows, plan.collator, row_count(plain.get_input_embeddings().weight))
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
    memory = {
        name: estimate(
            counted,
            strategy,
            gpus,
            optimizer=args.optim,
            checkpointing=args.gradient_checkpointing,
            mixed_precision=on_gpu,
        )
        for name, strategy in STRATEGIES.items()
        if gpus != 1 or name == "ddp"
    }
    console.print(memory_table(memory, gpus))
    say_the_rest(console, report, memory["ddp"], batch, args.gradient_checkpointing)
    for note in plan.notes:
        console.print(note)
    refused = {**refusals(model_args), **plan.refused} if gpus > 1 else {}
    for name, reason in refused.items():
        console.print(f"{name} is refused for this recipe: {reason}")
    return report | {"memory": memory, "refused": refused}


def refusals(model_args) -> dict[str, str]:
    """Strategies that the real run would refuse, and why."""
    if not model_args.use_peft or not model_args.train_new_tokens:
        return {}
    reason = "LoRA with trainable token rows reads output rows that it cuts apart (`train_new_tokens: false` lifts it)."
    return {"zero3": reason}


def memory_table(memory: dict[str, Estimate], gpus: int) -> Table:
    """GiB per GPU, one row a strategy."""
    table = Table(
        title=f"Estimated memory per GPU in GiB, {gpus} GPU{'s' * (gpus > 1)}", title_justify="left"
    )
    table.add_column("config")
    parts = ("weights", "gradients", "optimizer", "activations", "working")
    for part in (*parts, "total"):
        table.add_column(part, justify="right")
    for name, one in memory.items():
        label = "single_gpu" if name == "ddp" and gpus == 1 else name
        table.add_row(label, *(gib(getattr(one, part)) for part in parts), f"[bold]{gib(one.total)}[/]")
    return table


def say_the_rest(console: Console, report: dict, one: Estimate, batch: int, on: bool) -> None:
    """What the table stands on, and what turning gradient checkpointing would change."""
    console.print(
        f"For {batch} row{'s' * (batch > 1)} of {report['longest_row']} tokens, the longest of the first "
        f"{report['rows_measured']}; longer rows need more. The CUDA context and the allocator add 1-2 GiB."
    )
    console.print(
        f"Activations are {gib(one.activations)} GiB with gradient checkpointing {'on' if on else 'off'}, and would be "
        f"{gib(one.activations_otherwise)} GiB with it {'off' if on else 'on'}."
    )
    for note in one.notes:
        console.print(f"{note}.")
