"""`vlm-sft-rl demo r3v`: self-training by reflection from base weights to a report, by the commands of real models.

`reproduce` runs the ablations and STaR beside it, with several seeds; all variants of a seed share round 0.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table as TerminalTable

from ..errors import UserError
from ..evaluation import report
from ..evaluation.report import percent
from ..io import read_json, read_jsonl, write_json
from ..pocket.problems import build_problem_set
from ..runs import versions
from ..self_train import self_train
from ..self_training.config import VARIANTS
from ..self_training.figures import difference, interval

BASE = Path(__file__).parents[1] / "pocket" / "base"
SYSTEMS = ("greedy", "majority", "self_select", "self_refine", "pass_at_k")
# name -> what it changes in the recipe
REPRODUCED: dict[str, dict[str, object]] = {
    "full": {},
    "no_refine": {"variant": "no_refine"},
    "no_select": {"variant": "no_select"},
    "no_iteration": {"variant": "no_iteration"},
    "star": {"variant": "star"},
    "distill": {"variant": "distill"},
    "zero_shot": {"variant": "zero_shot"},
    # options of ours, off by default
    "deduplicate": {"deduplicate": True},
    "balance": {"balance": True},
    "max_solve_rate": {"max_solve_rate": 0.67},
}
BOOTSTRAP_ROUNDS = 1000


def run(
    output_dir: str | Path,
    *,
    seed: int = 0,
    questions: int | None = None,
    steps: int | None = None,
    variant: str = "full",
    options: Mapping[str, object] | None = None,
    console: Console | None = None,
) -> dict:
    """Run or resume the demo and return its summary.

    Args:
        questions: test questions; None takes all of the problem set.
        steps: training steps of each round; None takes the recipe's epochs.
        variant: see `self_training.config.VARIANTS`.
        options: keys of the recipe with other values.

    Raises:
        UserError: `output_dir` holds a demo with other settings, or a stage failed.
    """
    from transformers.utils import logging

    if variant not in VARIANTS:
        raise UserError(f"There is no variant {variant!r}. Variants: {', '.join(VARIANTS)}.")
    logging.disable_progress_bar()  # a bar for every loading of a small model hides the demo's own progress
    started = time.monotonic()
    folder, console = Path(output_dir), console or Console()
    sizes = {"test": questions} if questions else None
    problems = build_problem_set(folder / "problems", seed=seed, sizes=sizes)
    overrides = {
        "model_name_or_path": BASE,
        "image_root": problems,
        "output_dir": folder / "run",
        "seed": seed,
        "variant": variant,
        **(options or {}),
        **{f"{split}_questions": problems / f"{split}.jsonl" for split in ("train", "test")},
        "warmup_file": problems / "warmup.jsonl",
    }
    if steps is not None:
        overrides["max_steps"] = steps
    words = [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
    found = self_train("r3v/pocket", words, accelerate_config="cpu", console=console)
    summary = {
        "method": "r3v",
        "variant": found["variant"],
        "n": found["n"],
        "seed": seed,
        "seconds": found["seconds"],
        "rounds": [
            {"round": m["round"], **{name: m[name] for name in ("direct", "sample", *SYSTEMS)}}
            for m in found["rounds"]
        ],
        "pools": found["pools"],
        "rows": found["rows"],
        "versions": versions(),
    }
    write_json(folder / "summary.json", summary)
    shutil.copyfile(folder / "run" / "report.html", folder / "report.html")
    console.print(
        f"Report: {folder / 'report.html'} ({time.monotonic() - started:.0f} s now)", highlight=False
    )
    return summary


def reproduce(
    output_dir: str | Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    variants: Sequence[str] = tuple(REPRODUCED),
    questions: int = 500,
    steps: int | None = None,
    console: Console | None = None,
) -> dict:
    """Every variant with every seed; writes reproduce.json and report.html and returns the former.

    Questions, base and seeds are the same for all variants, so differences to `full` are paired over questions.

    Args:
        variants: names of `REPRODUCED`.
        questions: test questions of each seed.

    Raises:
        UserError: an unknown variant, or what `run` raises.
    """
    if unknown := [name for name in variants if name not in REPRODUCED]:
        raise UserError(f"There is no variant {unknown[0]!r}. To reproduce: {', '.join(REPRODUCED)}.")
    folder, console = Path(output_dir), console or Console()
    for seed in seeds:
        for variant in variants:
            place = folder / f"seed-{seed}" / variant
            if not (place / "summary.json").is_file():
                _share(folder / f"seed-{seed}" / "full", place, variant)
            console.rule(f"[bold]{variant}, seed {seed}")
            options = REPRODUCED[variant]
            run(place, seed=seed, questions=questions, steps=steps, options=options, console=console)
    table = {variant: _over_seeds(folder, variant, seeds) for variant in variants}
    result = {"seeds": list(seeds), "variants": table, "versions": versions()}
    write_json(folder / "reproduce.json", result)
    console.print(_table(result))
    _report(folder / "report.html", result)
    return result


def _share(full: Path, place: Path, variant: str) -> None:
    """Take over what a variant has in common with `full`: the problems, and round 0 where it is the same."""
    if place == full or place.exists() or not (full / "summary.json").is_file():
        return
    unfinished = place.with_name(f".{place.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(full / "problems", unfinished / "problems")
    if variant != "zero_shot":
        skip = shutil.ignore_patterns("pool", "pool.json") if variant == "no_iteration" else None
        shutil.copytree(full / "run" / "round-0", unfinished / "run" / "round-0", ignore=skip)
    unfinished.rename(place)


def _over_seeds(folder: Path, variant: str, seeds: Sequence[int]) -> dict:
    """The last round's figures over the questions of all seeds together, and the paired difference to `full`."""
    values = {name: [] for name in ("greedy", "self_select", "majority")}
    gaps: list[tuple[float, float]] = []
    by_seed = []
    for seed in seeds:
        own = last_round(folder / f"seed-{seed}" / variant)
        full = last_round(folder / f"seed-{seed}" / "full")
        for name, rights in own.items():
            values[name] += rights
        gaps += list(zip(own["greedy"], full["greedy"], strict=True))
        by_seed.append(round(sum(own["greedy"]) / len(own["greedy"]), 4))
    return {
        "n": len(gaps),
        **{name: interval(rights, BOOTSTRAP_ROUNDS, 0) for name, rights in values.items()},
        "greedy_by_seed": by_seed,
        "minus_full": difference([a for a, _ in gaps], [b for _, b in gaps], BOOTSTRAP_ROUNDS, 0),
    }


def last_round(place: Path) -> dict[str, list[float]]:
    """0/1 per test question of a run's last round."""
    from ..self_training.figures import majority_right
    from ..self_training.pool import Candidate

    number = read_json(place / "summary.json")["rounds"][-1]["round"]
    rows = [row for _, row in read_jsonl(place / "run" / f"round-{number}" / "graded.jsonl")]
    votes = [majority_right([Candidate(**c) for c in row["samples"]][:3]) for row in rows]
    return {
        "greedy": [float(row["greedy"]["status"] == "right") for row in rows],
        "self_select": [float(row["self_select"]["status"] == "right") for row in rows],
        "majority": [float(vote) for vote in votes],
    }


_COLUMNS = ("greedy", "majority", "self_select")


def _cells(figures: dict) -> list[str]:
    seeds = ", ".join(f"{100 * value:.1f}" for value in figures["greedy_by_seed"])
    return [*[percent(figures[name]) for name in _COLUMNS], seeds, percent(figures["minus_full"])]


def _table(result: dict) -> TerminalTable:
    n = next(iter(result["variants"].values()))["n"]
    table = TerminalTable(
        title=f"Last round, accuracy (%), {len(result['seeds'])} seeds, n = {n}",
        caption="95 % bootstrap intervals over the questions of all seeds; training varies with the seed beyond them",
    )
    for heading in ("variant", *_COLUMNS, "greedy by seed", "greedy - full"):
        table.add_column(heading, no_wrap=heading == "variant")
    for variant, figures in result["variants"].items():
        table.add_row(variant, *[cell.replace("[", "\\[") for cell in _cells(figures)])
    return table


def _report(path: Path, result: dict) -> None:
    columns = ["variant", *[name.replace("_", " ") for name in _COLUMNS], "greedy by seed", "greedy - full"]
    rows = [[variant.replace("_", " "), *_cells(f)] for variant, f in result["variants"].items()]
    n = next(iter(result["variants"].values()))["n"]
    report.render_report(
        "R3V and its ablations on the pocket world",
        [report.Table("Last round, accuracy (%)", columns, rows)],
        path,
        subtitle=f"Seeds {', '.join(map(str, result['seeds']))}; n = {n} answers; 95 % bootstrap intervals over questions.",
        command="make reproduce-r3v",
    )
