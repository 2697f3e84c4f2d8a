"""Results of runs in a model card: the Hub's `model-index`, and a table that a reader sees."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..io import read_json, read_text, write_text

BEGIN, END = "<!-- vlm-sft-rl eval: begin -->", "<!-- vlm-sft-rl eval: end -->"


def _summary(folder: Path) -> dict:
    path = folder / "summary.json"
    if not path.is_file():
        raise UserError(
            f"{folder}: no summary.json in it. Give the output folder of a finished `vlm-sft-rl eval`."
        )
    return read_json(path)


def _how(summary: dict) -> str:
    tau = f", τ = {summary['threshold']:g}" if summary["threshold"] is not None else ""
    judge = f", judged by {summary['judge']['model']}" if summary.get("judge") else ""
    return f"{summary['decoder']}{tau}{judge}"


def results_table(summaries: Sequence[dict]) -> str:
    """A Markdown table with every metric, its interval, n, and how the answers were made."""
    lines = ["| benchmark | metric | value | interval | n | decoding |", "|---|---|---|---|---|---|"]
    for summary in summaries:
        for name, found in summary["metrics"].items():
            interval = f"{found['low']:.4g} to {found['high']:.4g}"
            cells = (summary["spec"], name, f"{found['value']:.4g}", interval, summary["n"], _how(summary))
            lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    first = summaries[0]["config"]
    lines += [
        "",
        f"Intervals: {first['level']:.0%} percentile bootstrap over questions, {first['rounds']} rounds.",
    ]
    return "\n".join(lines)


def update_card(readme: str | Path, runs: Sequence[str | Path], model_name: str | None = None) -> Path:
    """Write the results of `runs` into a model card; what an earlier call wrote is replaced, the rest stays.

    Args:
        readme: the card (README.md of the model's folder); made if it is not there.
        runs: output folders of `vlm-sft-rl eval`.
        model_name: name in the card's metadata; default the folder's.

    Raises:
        UserError: a run is not finished, or the card's metadata cannot be read.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    path = Path(readme)
    summaries = [_summary(Path(run)) for run in runs]
    if not summaries:
        raise UserError(
            "eval card needs at least one run: vlm-sft-rl eval card RUN … --readme MODEL_DIR/README.md"
        )
    try:
        text = read_text(path) if path.is_file() else f"---\n{{}}\n---\n\n# {path.resolve().parent.name}\n"
        card = ModelCard(text)
    except ValueError as error:
        raise UserError(f"{path}: its metadata (between the lines ---) cannot be read: {error}") from error
    results = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=summary["spec"],
            dataset_name=summary["description"],
            dataset_args={"n": summary["n"], "decoding": _how(summary), "seed": summary["seed"]},
            metric_type=name,
            metric_name=name,
            metric_value=round(found["value"], 6),
            metric_args={"low": round(found["low"], 6), "high": round(found["high"], 6)},
        )
        for summary in summaries
        for name, found in summary["metrics"].items()
    ]
    metadata = card.data.to_dict()
    metadata.pop("model-index", None)
    name = model_name or card.data.model_name or path.resolve().parent.name
    card.data = ModelCardData(**(metadata | {"model_name": name, "eval_results": results}))
    block = f"{BEGIN}\n## Evaluation\n\n{results_table(summaries)}\n{END}"
    body = card.text
    if BEGIN in body and END in body:
        before, rest = body.split(BEGIN, 1)
        body = before + block + rest.split(END, 1)[1]
    else:
        body = body.rstrip() + f"\n\n{block}\n"
    return write_text(path, f"---\n{card.data.to_yaml()}\n---\n{body}")
