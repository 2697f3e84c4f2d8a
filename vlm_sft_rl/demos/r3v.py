"""`vlm-sft-rl demo r3v`: self-training by reflection from base weights to a report, by the commands of real models.

`reproduce` runs the ablations and STaR beside it, with several seeds; all variants of a seed share round 0.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from ..errors import UserError
from ..evaluation.report import Table, percent, render_report
from ..io import write_json
from ..pocket.problems import build_problem_set
from ..runs import versions
from ..self_train import self_train
from ..self_training.config import VARIANTS
from ..self_training.figures import difference, interval, majority_right
from ..self_training.pool import Candidate
from ..shapes import COUNT, read_lines, read_object
from .frame import BASE

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
SHOWN = ("greedy", "majority", "self_select")
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

    Raises UserError: `output_dir` holds a demo with other settings, or a stage failed.
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
    trained = self_train("r3v/pocket", words, accelerate_config="cpu", console=console)
    summary = {
        "method": "r3v",
        "variant": trained["variant"],
        "n": trained["n"],
        "seed": seed,
        "seconds": trained["seconds"],
        "rounds": [
            {"round": m["round"], **{name: m[name] for name in ("direct", "sample", *SYSTEMS)}}
            for m in trained["rounds"]
        ],
        "pools": trained["pools"],
        "rows": trained["rows"],
        "versions": versions(),
    }
    write_json(folder / "summary.json", summary)
    shutil.copyfile(folder / "run" / "report.html", folder / "report.html")
    console.print(
        f"Written to {folder / 'report.html'} ({time.monotonic() - started:.0f} s now)", highlight=False
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

    Raises UserError: an unknown variant, or what `run` raises.
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
    figures = {variant: _over_seeds(folder, variant, seeds) for variant in variants}
    result = {"seeds": list(seeds), "variants": figures, "versions": versions()}
    write_json(folder / "reproduce.json", result)
    n = next(iter(figures.values()))["n"]
    note = f"{len(seeds)} seeds, n = {n} answers; 95 % bootstrap intervals over the questions of all seeds. Training "
    note += "varies with the seed beyond them."
    columns = ["variant", *(name.replace("_", " ") for name in SHOWN), "greedy by seed", "greedy - full"]
    rows = [
        [
            variant.replace("_", " "),
            *(percent(row[name]) for name in SHOWN),
            ", ".join(f"{100 * value:.1f}" for value in row["greedy_by_seed"]),
            percent(row["minus_full"]),
        ]
        for variant, row in figures.items()
    ]
    table = Table("Last round, accuracy (%)", columns, rows, note)
    console.print(table.terminal())
    render_report(
        "R3V and its ablations on the pocket world",
        [table],
        folder / "report.html",
        subtitle=f"Seeds {', '.join(map(str, seeds))}; n = {n} answers; 95 % bootstrap intervals over questions.",
        command="make reproduce-r3v",
    )
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
    rights: dict[str, list[float]] = {name: [] for name in SHOWN}
    full: list[float] = []
    by_seed = []
    for seed in seeds:
        last = last_round(folder / f"seed-{seed}" / variant)
        for name in SHOWN:
            rights[name] += last[name]
        full += last_round(folder / f"seed-{seed}" / "full")["greedy"]
        by_seed.append(round(sum(last["greedy"]) / len(last["greedy"]), 4))
    return {
        "n": len(full),
        **{name: interval(values, BOOTSTRAP_ROUNDS, 0) for name, values in rights.items()},
        "greedy_by_seed": by_seed,
        "minus_full": difference(rights["greedy"], full, BOOTSTRAP_ROUNDS, 0),
    }


CANDIDATE = {"question": str, "round": COUNT, "index": COUNT, "text": str, "status": str} | dict.fromkeys(
    ("answer", "key"), (str, None)
)
GRADED = {"greedy": CANDIDATE, "self_select": CANDIDATE, "samples": [CANDIDATE]}


def last_round(place: Path) -> dict[str, list[float]]:
    """0/1 per test question of a run's last round."""
    cure = "Give the same command again to write it anew, or remove the folder."
    rounds = read_object(place / "summary.json", {"rounds": [{"round": COUNT}]}, cure)["rounds"]
    graded = place / "run" / f"round-{len(rounds) - 1}" / "graded.jsonl"
    rows = list(read_lines(graded, GRADED, cure))
    votes = [majority_right([Candidate(**c) for c in row["samples"]][:3]) for row in rows]
    return {
        "greedy": [float(row["greedy"]["status"] == "right") for row in rows],
        "majority": [float(vote) for vote in votes],
        "self_select": [float(row["self_select"]["status"] == "right") for row in rows],
    }
