"""What the describer-locator demo shows at its end: a table, summary.json, report.html with drawn boxes and curves."""

from pathlib import Path

from rich.table import Table as TerminalTable

from ..evaluation import plots
from ..evaluation.bootstrap import Interval
from ..evaluation.region_report import LABELS, gallery, metrics_table
from ..evaluation.regions import region_differences
from ..evaluation.report import Figure, Footer, Text, render_report
from ..evaluation.run_config import versions
from ..files import read_json, write_json
from ..rewards.boxes import iou

NAMES = {"start": "start", "control": "control: more supervised steps", "tuned": "SC-Tune"}
KEYS = ("self_consistency_iou", "rec_acc50", "reg_exact", "caption_chair_i")
CURVES = {
    "describer/reward": "IoU, sampled descriptions",
    "describer/baseline": "IoU, greedy baseline",
    "locator/loss": "Locator loss (nats per token)",
}


def finish(demo) -> dict:
    """Print the table, write `summary.json` and `report.html`; returns the summary."""
    found = {system: read_json(demo.folder / "eval" / f"{system}.json") for system in NAMES}
    systems = {
        NAMES[system]: {name: Interval(**value) for name, value in row["metrics"].items()}
        for system, row in found.items()
    }
    samples = {system: demo.samples(system) for system in NAMES}
    differences = {
        other: {
            name: interval.to_json()
            for name, interval in region_differences(
                samples["tuned"], samples[other], 1000, demo.seed
            ).items()
        }
        for other in ("start", "control")
    }
    summary = {system: row["metrics"] for system, row in found.items()}
    summary |= {
        "n": found["tuned"]["n"],
        "scenes": demo.scenes,
        "steps": demo.steps,
        "seed": demo.seed,
        "tuned_minus": differences,
        "seconds": demo.stages.seconds,
        "stale": demo.stages.stale,
        "versions": versions(),
    }
    write_json(demo.folder / "summary.json", summary)
    _report(demo, systems, samples, differences)
    _print(demo, systems, summary)
    return summary


def _print(demo, systems: dict, summary: dict) -> None:
    table = TerminalTable(
        title="SC-Tune on the pocket world",
        caption=f"n = {summary['n']} boxes on {demo.scenes} held-out scenes, 95 % bootstrap intervals over images, seed "
        f"{demo.seed}",
    )
    table.add_column("")
    for name in systems:
        table.add_column(name, justify="right")
    for key in KEYS:
        table.add_row(LABELS[key], *(row[key].format() for row in systems.values()))
    demo.console.print(table)
    demo.console.print(f"Report: {demo.folder / 'report.html'}")


def changed_examples(start: list[dict], tuned: list[dict], count: int = 8) -> list[str]:
    """Boxes for the page: repaired, broken and unchanged failures in the order and proportion they occur, by image."""
    before = {s["id"]: iou(s["located"], s["box"]) >= 0.5 for s in start}
    seen, repaired, others = set(), [], []
    for sample in tuned:
        if sample["image"] in seen:
            continue
        now, then = iou(sample["located"], sample["box"]) >= 0.5, before[sample["id"]]
        if now and not then:
            repaired.append(sample["id"])
        elif not now:
            others.append(sample["id"])
        else:
            continue
        seen.add(sample["image"])
    half = count // 2
    return [*repaired[: count - min(half, len(others))], *others[:half]]


def _report(demo, systems: dict, samples: dict, differences: dict) -> Path:
    rows = systems
    history = read_json(demo.models / "tuned" / "trainer_state.json")["log_history"]
    words = [
        f"{LABELS[key]}: {d['value']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"
        for key, d in differences["start"].items()
        if key in KEYS
    ]
    versus = [
        f"{LABELS[key]}: {d['value']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"
        for key, d in differences["control"].items()
        if key in KEYS
    ]
    sections = [
        Text(
            "What was done",
            "In each scene two or three things share a noun and differ in colour. The start is the pocket base after a "
            "short supervised warm-up: its describer learnt from annotators who mostly say the noun alone, so what it says "
            "is often true of several things. SC-Tune then saw only boxes on fresh scenes, no text: a description earns "
            "the overlap of the box it leads a frozen copy to, and the locator learns from the descriptions. The control "
            "made as many updates on the warm-up rows.\n\nA box of the pocket world is a cell of its grid, as fine as the "
            "model sees, so the IoU of two boxes is 0 or 1 here.",
        ),
        metrics_table(rows, "Held-out scenes"),
        Text(
            "Differences, paired",
            "SC-Tune minus start. "
            + "; ".join(words)
            + ".\n\nSC-Tune minus control. "
            + "; ".join(versus)
            + ".",
        ),
        Figure(
            "Intervals",
            plots.both_schemes(
                plots.intervals_by_system, rows, ["self_consistency_iou", "rec_acc50", "reg_exact"]
            ),
            f"Dots are values, bars 95 % bootstrap intervals over {demo.scenes} images.",
        ),
        Figure(
            "Training", plots.both_schemes(plots.training_curves, history, CURVES), "Over steps of the loop."
        ),
        gallery(
            "Boxes",
            {NAMES[system]: own for system, own in samples.items() if system != "control"},
            changed_examples(samples["start"], samples["tuned"]),
            demo.regions,
            "Green: the region. Red: where SC-Tune's own description led it. First regions that the start could not find "
            "again and SC-Tune can, then regions that SC-Tune still misses. The heading is the shortest expression that "
            "picks the thing out.",
        ),
    ]
    command = f"vlm-sft-rl demo sc_tune --output-dir {demo.folder} --seed {demo.seed}"
    return render_report(
        "SC-Tune on the pocket world",
        sections,
        demo.folder / "report.html",
        subtitle="box → description → box, without text (arXiv 2403.13263)",
        footer=Footer(command),
    )
