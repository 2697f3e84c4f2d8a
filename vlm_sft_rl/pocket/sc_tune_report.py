"""What the describer-locator demo shows at its end: a table, summary.json, report.html with drawn boxes and curves."""

from pathlib import Path

from rich.table import Table as TerminalTable

from ..evaluation import plots
from ..evaluation.bootstrap import Interval
from ..evaluation.browsing import sample_picture
from ..evaluation.report import (
    AnswerView,
    Example,
    Figure,
    Footer,
    Gallery,
    Piece,
    Table,
    Text,
    render_report,
)
from ..evaluation.run_config import versions
from ..files import read_json, write_json
from ..rewards.boxes import iou
from .regions import scenes_of
from .sc_tune_figures import LABELS, SHOWN, described, differences

NAMES = {"start": "start", "control": "control: more supervised steps", "tuned": "SC-Tune"}
CURVES = {
    "describer/reward": "IoU, sampled descriptions",
    "describer/baseline": "IoU, greedy baseline",
    "locator/loss": "Locator loss (nats per token)",
    "locator/replay_loss": "Replay loss (nats per token)",
}


def finish(demo) -> dict:
    """Print the table, write `summary.json` and `report.html`; returns the summary."""
    found = {system: read_json(demo.folder / "eval" / f"{system}.json") for system in NAMES}
    systems = {
        NAMES[system]: {name: Interval(**value) for name, value in row["metrics"].items()}
        for system, row in found.items()
    }
    scenes = scenes_of(demo.regions)
    minus = {
        other: {
            name: interval.to_json()
            for name, interval in differences(demo.folder, "tuned", other, scenes, demo.seed).items()
        }
        for other in ("start", "control")
    }
    summary = {system: row["metrics"] for system, row in found.items()}
    summary |= {
        "n": found["tuned"]["n"],
        "scenes": demo.scenes,
        "steps": demo.steps,
        "seed": demo.seed,
        "tuned_minus": minus,
        "seconds": demo.stages.seconds,
        "stale": demo.stages.stale,
        "versions": versions(),
    }
    write_json(demo.folder / "summary.json", summary)
    _report(demo, systems, minus)
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
    for key in SHOWN:
        table.add_row(LABELS[key], *(row[key].format() for row in systems.values()))
    demo.console.print(table)
    demo.console.print(f"Report: {demo.folder / 'report.html'}")


def changed_examples(start: list[dict], tuned: list[dict], count: int = 8) -> list[str]:
    """Boxes for the page: repaired, broken and unchanged failures in the order and proportion they occur, by image."""
    before = {sample["id"]: hit(sample) for sample in start}
    seen, repaired, others = set(), [], []
    for sample in tuned:
        image = sample["reference"]["image"]
        if image in seen:
            continue
        now, then = hit(sample), before[sample["id"]]
        if now and not then:
            repaired.append(sample["id"])
        elif not now:
            others.append(sample["id"])
        else:
            continue
        seen.add(image)
    half = count // 2
    return [*repaired[: count - min(half, len(others))], *others[:half]]


def _figures(systems: dict) -> Table:
    names = [name for name in LABELS if any(name in row for row in systems.values())]
    rows = [[LABELS[name], *(row[name].format() for row in systems.values())] for name in names]
    return Table("Held-out scenes", ["", *systems], rows)


def _gallery(samples: dict[str, list[dict]], ids: list[str], demo, note: str) -> Gallery:
    """The same boxes by several systems; the boxes drawn are those of the last system."""
    indexed = {system: {sample["id"]: sample for sample in own} for system, own in samples.items()}
    examples = []
    for key in ids:
        views = [
            AnswerView(NAMES[system], [Piece(own[key]["answer"], truth=hit(own[key]))])
            for system, own in indexed.items()
        ]
        last = list(indexed.values())[-1][key]
        examples.append(Example(sample_picture(last, demo.regions), last["reference"]["captions"][0], views))
    return Gallery("Boxes", examples, note, legend=False)


def hit(sample: dict) -> bool:
    """Did the description lead back to its box?"""
    return iou(sample["located"], sample["reference"]["box"]) >= 0.5


def _listed(differences: dict) -> str:
    found = ((LABELS[key], differences[key]) for key in SHOWN)
    return "; ".join(f"{name}: {d['value']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]" for name, d in found)


def _report(demo, systems: dict, minus: dict) -> Path:
    samples = {system: described(demo.folder, system) for system in ("start", "tuned")}
    history = read_json(demo.models / "tuned" / "trainer_state.json")["log_history"]
    sections = [
        Text(
            "What was done",
            "In each scene two or three things share a noun and differ in colour. The start is the pocket base after a "
            "short supervised warm-up: its describer learnt from annotators who mostly say the noun alone, so what it says "
            "is often true of several things. SC-Tune then saw only boxes on fresh scenes, no text: a description earns "
            "the overlap of the box it leads a frozen copy to, and the locator learns from the descriptions. The control "
            "made as many updates on the warm-up rows. Both also saw captions that the start itself had written, so that "
            "they still caption.\n\nA box of the pocket world is a cell of its grid, as fine as the model sees, so the "
            "IoU of two boxes is 0 or 1 here.",
        ),
        _figures(systems),
        Text(
            "Differences, paired",
            f"SC-Tune minus start. {_listed(minus['start'])}.\n\nSC-Tune minus control. {_listed(minus['control'])}.",
        ),
        Figure(
            "Intervals",
            plots.both_schemes(
                plots.intervals_by_system, systems, ["self_consistency_iou", "rec_acc50", "reg_exact"]
            ),
            f"Dots are values, bars 95 % bootstrap intervals over {demo.scenes} images.",
        ),
        Figure(
            "Training", plots.both_schemes(plots.training_curves, history, CURVES), "Over steps of the loop."
        ),
        _gallery(
            samples,
            changed_examples(samples["start"], samples["tuned"]),
            demo,
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
