"""`make reproduce-sc-tune`: which part of the loop does what, over several seeds on the pocket world."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ..files import read_json, write_json
from .demo_sc_tune import (
    CAPTIONED,
    MEASURED,
    RECIPE_FILE,
    TRAINED,
    Demo,
    phase_steps,
)
from .sc_tune_figures import LABELS, SHOWN

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
}


def run(
    output_dir: str | Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    variants: Sequence[str] = tuple(VARIANTS),
    scenes: int = 300,
    steps: int | None = None,
    console: Console | None = None,
) -> dict:
    """Run or resume every variant with every seed; writes `summary.json` with mean and range over seeds.

    The seed draws scenes, warms up the model and orders the boxes, so that runs of different seeds share nothing.
    """
    folder, console = Path(output_dir), console or Console()
    found: dict[str, list[dict]] = {}
    for seed in seeds:
        console.rule(f"seed {seed}")
        demo = Demo(folder / f"seed-{seed}", console, seed=seed, scenes=scenes, steps=steps)
        demo.prepare()
        stages = demo.stages
        stages.run("train the control on the warm-up rows", demo.train_control, (*CAPTIONED, RECIPE_FILE))
        for name in variants:
            words = VARIANTS[name] | _alone(name, demo.steps)
            stages.run(f"tune {name}", lambda demo=demo, n=name, w=words: demo.tune(n, **w), TRAINED)
        for name in ("start", "control", *variants):
            stages.run(f"measure {name}", lambda demo=demo, n=name: demo.measure(n), MEASURED)
            found.setdefault(name, []).append(read_json(demo.folder / "eval" / f"{name}.json")["metrics"])
    summary = {
        "systems": {name: _over_seeds(rows) for name, rows in found.items()},
        "seeds": list(seeds),
        "scenes": scenes,
        "steps": demo.steps,
    }
    write_json(folder / "summary.json", summary)
    console.print(_table(summary))
    return summary


def _alone(name: str, steps: int) -> dict:
    """A phase by itself takes as many steps as it has in the whole loop."""
    describer, locator = phase_steps(steps)
    return {"describer_only": {"max_steps": describer}, "locator_only": {"max_steps": locator}}.get(name, {})


def _over_seeds(rows: list[dict]) -> dict:
    values = {name: [row[name]["value"] for row in rows] for name in SHOWN}
    return {
        name: {"mean": float(np.mean(own)), "low": min(own), "high": max(own), "values": own}
        for name, own in values.items()
    }


def _table(summary: dict) -> Table:
    seeds = ", ".join(map(str, summary["seeds"]))
    table = Table(
        title="SC-Tune on the pocket world: mean over seeds [lowest, highest]", caption=f"seeds {seeds}"
    )
    table.add_column("")
    for name in SHOWN:
        table.add_column(LABELS[name], justify="right")
    for system, row in summary["systems"].items():
        cells = [f"{row[n]['mean']:.3f} [{row[n]['low']:.3f}, {row[n]['high']:.3f}]" for n in SHOWN]
        table.add_row(system, *cells)
    return table
