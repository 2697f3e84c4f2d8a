"""The report before step 1: what is trained, and how long the rows are."""

from collections.abc import Iterable
from itertools import islice

from rich.console import Console
from rich.table import Table

from ..data.chat import get_tokenizer
from .lora import trainable_rows
from .parts import count_parameters, unwrap
from .tokens import is_tied

ROWS_MEASURED = 64


def startup_report(
    model, processor, dataset: Iterable[dict] = (), collator=None, rows: int = ROWS_MEASURED
) -> dict:
    """What a run is about to do.

    Args:
        model: the model to be trained, PEFT-wrapped or not.
        dataset, collator: measured over the first `rows` rows, when given.

    Returns:
        `family`, `dtype`, `tied`, `token_rows` (trainable rows by embedding, or `all` / `none`), `parameters`
        (`{part: {total, trainable}}`), and with data `image_tokens`, `longest_row`, `supervised_tokens` (means are
        per row), `rows_measured`.
    """
    plain = unwrap(model)
    whole = "all" if plain.get_input_embeddings().weight.requires_grad else "none"
    report = {
        "family": plain.config.model_type,
        # `bfloat16`, or `float32 + uint8` for a mixture
        "dtype": " + ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})),
        "tied": is_tied(plain),
        "token_rows": trainable_rows(model) or whole,
        "parameters": count_parameters(model),
    }
    return report | (measure_rows(processor, plain, dataset, collator, rows) if collator is not None else {})


def measure_rows(processor, model, dataset: Iterable[dict], collator, count: int) -> dict:
    """Image tokens (mean per row), the longest row and supervised tokens (mean) of the usable among the first `count`."""
    image_id = image_token_id(processor, model)
    images, lengths, supervised = [], [], []
    for row in islice(dataset, count):
        batch = collator([row])
        # a preference row has two answers: the figures are of one of them
        answers = 1 if "labels" in batch else 2
        mask = batch["labels"] != -100 if "labels" in batch else batch["completion_mask"]
        learnt = int(mask.sum())
        if not learnt:  # a stand-in for a skipped row
            continue
        images.append(int((batch["input_ids"] == image_id).sum()) // answers)
        lengths.append(int(batch["attention_mask"].sum(-1).max()))
        supervised.append(learnt // answers)
    n = max(len(lengths), 1)
    return {
        "image_tokens": sum(images) / n,
        "longest_row": max(lengths, default=0),
        "supervised_tokens": sum(supervised) / n,
        "rows_measured": len(lengths),
    }


def image_token_id(processor, model) -> int | None:
    """The id that stands for image features in `input_ids`; families keep it in different places."""
    for holder in (processor, model.config):
        if isinstance(token_id := getattr(holder, "image_token_id", None), int):
            return token_id
    token = getattr(processor, "image_token", None)
    return get_tokenizer(processor).convert_tokens_to_ids(token) if isinstance(token, str) else None


def print_report(report: dict, console: Console | None = None) -> None:
    """Print the report as a table."""
    table = Table(title="Training", show_header=False, title_justify="left")
    table.add_row("model family", report["family"])
    table.add_row("weights", report["dtype"])
    table.add_row("embeddings", "tied" if report["tied"] else "input and output apart")
    rows = report["token_rows"]
    if isinstance(rows, dict):
        rows = "\n".join(f"{name.split('.')[-1]}: {', '.join(map(str, ids))}" for name, ids in rows.items())
    table.add_row("embedding rows that train", rows)
    for part, count in report["parameters"].items():
        table.add_row(f"{part} parameters", f"{count['trainable']:,} of {count['total']:,} train")
    if "longest_row" in report:
        n = report["rows_measured"]
        table.add_row("image tokens", f"{report['image_tokens']:.0f} a row (mean of the first {n})")
        table.add_row("supervised tokens", f"{report['supervised_tokens']:.0f} a row (mean of the first {n})")
        table.add_row("longest row", f"{report['longest_row']} tokens (of the first {n})")
    (console or Console()).print(table)
