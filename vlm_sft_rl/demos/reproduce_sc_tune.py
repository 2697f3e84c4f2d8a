"""`make reproduce-sc-tune`: which part of the loop does what, over several seeds on the pocket world."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ..io import read_json, write_json
from ..pocket.regions import scenes_of
from .sc_tune import (
    CAPTIONED,
    LABELS,
    MEASURED,
    RECIPE_FILE,
    SHOWN,
    TRAINED,
    WARM_UP_STEPS,
    Demo,
    differences,
    phase_steps,
)

# name -> what it changes in recipes/sc_tune/pocket.yaml
VARIANTS: dict[str, dict] = {
    "both": {},
    "describer_only": {"locator_steps": 0, "replay_share": 0},
    "no_replay": {"replay_share": 0},
    "locator_only": {"describer_steps": 0},
    "baseline_none": {"baseline": "none"},
    "baseline_greedy_live": {"baseline": "greedy_live"},
    "baseline_group": {"baseline": "group"},
    "kl_0": {"kl_coef": 0.0},
    "kl_start": {"kl_coef": 0.1, "kl_anchor": "start"},
    "giou": {"rewards": "giou"},
    "short": {"rewards": "iou length", "reward_weights": "1.0 0.02"},
    "caption_filter": {"min_caption_iou": 0.5},
    "rec": {"rec_file": "annotated.jsonl"},
}


def run(
    output_dir: str | Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    variants: Sequence[str] = tuple(VARIANTS),
    scenes: int = 300,
    steps: int | None = None,
    warm_up_steps: int = WARM_UP_STEPS,
    console: Console | None = None,
) -> dict:
    """Run or resume every variant with every seed; writes `summary.json` with mean and range over seeds.

    `systems` holds the figures, `against_start` their paired differences to the start: per seed with intervals.

    The seed draws scenes, warms up the model and orders the boxes, so that runs of different seeds share nothing.
    """
    folder, console = Path(output_dir), console or Console()
    found: dict[str, list[dict]] = {}
    gained: dict[str, list[dict]] = {}
    for seed in seeds:
        console.rule(f"seed {seed}")
        settings = {"seed": seed, "scenes": scenes, "steps": steps, "warm_up_steps": warm_up_steps}
        demo = Demo(folder / f"seed-{seed}", console, **settings)
        demo.prepare()
        stages = demo.stages
        stages.run("train the control on the warm-up rows", demo.train_control, (*CAPTIONED, RECIPE_FILE))
        for name in variants:
            words = overrides(name, demo)
            stages.run(f"tune {name}", lambda demo=demo, n=name, w=words: demo.tune(n, **w), TRAINED)
        for name in ("start", "control", *variants):
            stages.run(f"measure {name}", lambda demo=demo, n=name: demo.measure(n), MEASURED)
            found.setdefault(name, []).append(read_json(demo.folder / "eval" / f"{name}.json")["metrics"])
        truth = scenes_of(demo.regions)
        for name in ("control", *variants):
            more = differences(demo.folder, name, "start", truth, seed)
            gained.setdefault(name, []).append({key: more[key].to_json() for key in SHOWN})
    summary = {
        "systems": {name: _over_seeds(rows) for name, rows in found.items()},
        "against_start": {name: _over_seeds(rows) for name, rows in gained.items()},
        "seeds": list(seeds),
        "scenes": scenes,
        "steps": demo.steps,
    }
    write_json(folder / "summary.json", summary)
    for key, title in (
        ("systems", "mean over seeds"),
        ("against_start", "minus the start, paired: mean over seeds"),
    ):
        console.print(_table(summary[key], summary["seeds"], title))
    return summary


def overrides(name: str, demo: Demo) -> dict:
    """What a variant changes in the recipe for this demo's steps and files."""
    describer, locator = phase_steps(demo.steps)
    # a phase by itself takes as many steps as it has in the whole loop
    alone = {"describer_only": {"max_steps": describer}, "locator_only": {"max_steps": locator}}
    words = VARIANTS[name] | alone.get(name, {})
    return words | ({"rec_file": demo.regions / words["rec_file"]} if "rec_file" in words else {})


def _over_seeds(rows: list[dict]) -> dict:
    found = {}
    for name in SHOWN:
        values = [row[name]["value"] for row in rows]
        found[name] = {
            "mean": float(np.mean(values)),
            "low": min(values),
            "high": max(values),
            "seeds": [row[name] for row in rows],
        }
    return found


def _table(systems: dict, seeds: Sequence[int], what: str) -> Table:
    table = Table(
        title=f"SC-Tune on the pocket world: {what} [lowest, highest]",
        caption=f"seeds {', '.join(map(str, seeds))}",
    )
    table.add_column("")
    for name in SHOWN:
        table.add_column(LABELS[name], justify="right")
    for system, row in systems.items():
        cells = [f"{row[n]['mean']:.3f} [{row[n]['low']:.3f}, {row[n]['high']:.3f}]" for n in SHOWN]
        table.add_row(system, *cells)
    return table
