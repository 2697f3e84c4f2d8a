"""`vlm-sft-rl regions eval`: describe every box, find it again, and measure both."""

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .data.regions import RegionCollator, read_regions
from .errors import UserError
from .evaluation.bootstrap import Interval
from .evaluation.region_report import LABELS, write_region_report
from .evaluation.regions import region_metrics
from .evaluation.run_config import claim, model_digest, versions
from .evaluation.samples import cut_broken_end
from .files import append_jsonl, read_jsonl, write_json
from .models.boxes import convention_for
from .models.load import load_for_inference
from .models.region_prompts import DESCRIBE, LOCATE, RegionPrompts
from .models.sidecar import Sidecar
from .rewards.leak import spells_coordinates
from .trainers.rollouts import Rollouts


@dataclass(frozen=True)
class RegionDecoding:
    """How boxes are described and descriptions located; greedy."""

    describe_max_new_tokens: int = 30
    locate_max_new_tokens: int = 20
    min_new_tokens: int = 1
    describer: str = "plain"
    rollout_batch_size: int | None = None
    seed: int = 0
    top_k: int | None = None
    top_p: float | None = None


def evaluate_regions(
    model_dir: str | Path,
    regions: str | Path,
    output_dir: str | Path,
    *,
    image_root: str | Path | None = None,
    box_convention: str | None = None,
    describe_prompt: str | None = None,
    locate_prompt: str | None = None,
    decoding: RegionDecoding | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    rounds: int = 1000,
    seed: int = 0,
    reg: bool = False,
    grade=None,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict:
    """Write `samples.jsonl` (resumable by id), `summary.json` and `report.html`; returns the summary.

    Args:
        regions: region rows; with `expression` they also measure REC.
        box_convention, describe_prompt, locate_prompt: None takes what the checkpoint was trained with.
        reg: also CIDEr and METEOR of the descriptions against the expressions (extra `reg`).
        grade: (row, description) -> does it pick out the one thing; adds `reg_exact`.

    Raises:
        UserError: rows, model or settings that do not fit, or a folder of another configuration.
    """
    console, decoding = console or Console(), decoding or RegionDecoding()
    folder, model_dir = Path(output_dir), Path(model_dir)
    rows = read_regions(regions)[:limit]
    if reg and not all(row.get("expression") for row in rows):
        raise UserError(f"{regions}: REG scores need an `expression` in every row.")
    model, processor, sidecar = load_for_inference(model_dir)
    sidecar = sidecar or Sidecar()
    trained = sidecar.recipe or {}
    convention = convention_for(model, box_convention or sidecar.box_convention)
    describe = describe_prompt or trained.get("describe_prompt") or DESCRIBE
    locate = locate_prompt or trained.get("locate_prompt") or LOCATE
    config = {
        "model": str(model_dir),
        "model_digest": model_digest(model_dir),
        "regions": str(regions),
        "box_convention": convention.name,
        "describe_prompt": describe,
        "locate_prompt": locate,
        "decoding": vars(decoding),
    }
    claim(folder, config, overwrite=overwrite)
    prompts = RegionPrompts(processor, convention, describe, locate)
    rollouts = Rollouts(processor, prompts, decoding, sidecar.threshold)
    path = folder / "samples.jsonl"
    cut_broken_end(path)
    done = {row["id"]: row for _, row in read_jsonl(path)} if path.is_file() else {}
    missing = [row for row in rows if row["id"] not in done]
    collate = RegionCollator(image_root)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(
            "describing and locating", total=len(rows), completed=len(rows) - len(missing)
        )
        for start in range(0, len(missing), batch_size):
            part = collate(missing[start : start + batch_size])["rows"]
            part = [row | {"resized": prompts.resized(row["picture"])} for row in part]
            found = rollouts.captions(model, part, None, locate=True, expressions=True)
            samples = [_sample(rollout, prompts, grade) for rollout in found]
            append_jsonl(path, samples)
            done |= {sample["id"]: sample for sample in samples}
            progress.advance(task, len(part))
    samples = [done[row["id"]] for row in rows]
    metrics = region_metrics(samples, rounds, seed)
    if reg:
        from .evaluation.reg import reg_scores

        said = {s["id"]: s["description"] for s in samples}
        metrics |= reg_scores(said, {s["id"]: [s["expression"]] for s in samples}, rounds=rounds, seed=seed)
    summary = {
        "metrics": {name: interval.to_json() for name, interval in metrics.items()},
        "n": len(samples),
        "images": len({sample["image"] for sample in samples}),
        "config": config | {"rounds": rounds, "level": 0.95},
        "seed": seed,
        "versions": versions(),
    }
    write_json(folder / "summary.json", summary)
    command = f"vlm-sft-rl regions eval --model {model_dir} --regions {regions}"
    write_region_report(
        folder / "report.html",
        metrics,
        samples,
        title=f"Regions: {model_dir.name}",
        image_root=image_root,
        command=command,
    )
    console.print(_table(metrics, summary))
    return summary


def _sample(rollout, prompts: RegionPrompts, grade) -> dict:
    row, one = rollout.row, rollout.samples[0]
    sample = {
        "id": row["id"],
        "image": row["image"] if isinstance(row["image"], str) else row["id"],
        "box": row["box"],
        "description": one.text,
        "located": list(one.located) if one.located else None,
        "leak": spells_coordinates(one.text, prompts.finds_box),
    }
    if row.get("expression"):
        found = rollout.found[row["expression"]]
        sample |= {"expression": row["expression"], "found": list(found) if found else None}
    if grade is not None:
        sample["exact"] = bool(grade(row, one.text))
    return json.loads(json.dumps(sample))


def _table(metrics: dict[str, Interval], summary: dict) -> Table:
    caption = f"n = {summary['n']} boxes on {summary['images']} images, 95 % bootstrap intervals over images"
    table = Table(title=summary["config"]["model"], caption=caption)
    table.add_column("")
    table.add_column("value [interval]", justify="right")
    for name, interval in metrics.items():
        table.add_row(LABELS.get(name, name), interval.format())
    return table
