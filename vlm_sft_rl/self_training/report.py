"""What a run shows at its end: a table, scaling.csv, and report.html with the rounds, the curves and flipped answers."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table as TerminalTable

from ..data.images import open_image
from ..evaluation import plots, report
from ..io import read_jsonl, write_text

if TYPE_CHECKING:
    from .loop import SelfTraining

SYSTEMS = {
    "direct": "direct answer",
    "greedy": "greedy rationale",
    "sample": "one sample",
    "majority": "majority of k",
    "self_select": "self-select of k",
    "self_refine": "self-refine",
    "pass_at_k": "pass@k (oracle)",
}
EXAMPLES = 3
FLIPS = {
    "gained": "Became right over the rounds",
    "refined": "Refined from wrong to right",
    "spoiled": "Refined from right to wrong",
}


def interval_text(interval: dict, digits: int = 1) -> str:
    value, low, high = (100 * interval[key] for key in ("value", "low", "high"))
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def finish(run: "SelfTraining", summary: dict) -> None:
    """Print the table; write scaling.csv and report.html."""
    rounds = summary["rounds"]
    write_text(run.output / "scaling.csv", scaling_csv(rounds))
    run.console.print(rounds_table(summary))
    title = f"Self-training by reflection: {summary['variant'].replace('_', ' ')}"
    report.render_report(
        title,
        sections(run, summary),
        run.output / "report.html",
        subtitle=f"{summary['n']} test questions, {len(run.train)} training questions, seed {summary['seed']}; "
        "95 % bootstrap intervals over test questions.",
        footer=report.Footer("vlm-sft-rl self-train"),
    )
    run.console.print(f"Written to {run.output}", highlight=False)


def rounds_table(summary: dict) -> TerminalTable:
    """Accuracy in per cent by round and system."""
    table = TerminalTable(
        title=f"Accuracy (%), n = {summary['n']}, seed {summary['seed']}, {summary['variant']}",
        caption="95 % bootstrap intervals over test questions",
    )
    table.add_column("")
    for metrics in summary["rounds"]:
        table.add_column(f"round {metrics['round']}", justify="right")
    for key, label in SYSTEMS.items():
        table.add_row(label, *[interval_text(m[key]).replace("[", "\\[") for m in summary["rounds"]])
    return table


def scaling_csv(rounds: Sequence[dict]) -> str:
    """Lines `round, n, method, value, low, high` for n = 1…K samples; self-select at its own k."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("round", "n", "method", "value", "low", "high"))
    for metrics in rounds:
        for point in metrics["scaling"]:
            for method in ("majority", "pass", "self_select"):
                if method in point:
                    writer.writerow((metrics["round"], point["n"], method, *_ends(point[method])))
    return out.getvalue()


def _ends(interval: dict) -> tuple[float, float, float]:
    return interval["value"], interval["low"], interval["high"]


def sections(run: "SelfTraining", summary: dict) -> list[report.Section]:
    rounds = summary["rounds"]
    first, last = rounds[0], rounds[-1]
    shown = [(first, "greedy"), (last, "greedy"), (last, "self_select")][0 if len(rounds) > 1 else 1 :]
    tiles = [
        report.Tile(f"{SYSTEMS[key]}, round {m['round']}", f"{100 * m[key]['value']:.1f} %", _note(m[key]))
        for m, key in shown
    ]
    tiles.append(
        report.Tile(
            "greedy rationales without a readable answer", f"{100 * last['unreadable']['value']:.1f} %"
        )
    )
    found: list[report.Section] = [report.Tiles("Result", tiles)]
    if len(rounds) > 1:
        curves = {
            label: [(m["round"], m[key]) for m in rounds]
            for key, label in SYSTEMS.items()
            if key not in ("sample",)
        }
        found.append(
            report.Figure(
                "Accuracy by round",
                lambda dark: plots.lines_with_intervals(curves, x="Round", y="Accuracy (%)", dark=dark),
            )
        )
    found.append(
        report.Table(
            "Rounds (%)",
            ["system", *[f"round {m['round']}" for m in rounds]],
            [[label, *[interval_text(m[key]) for m in rounds]] for key, label in SYSTEMS.items()],
            note=f"Majority, self-select and pass@k use k = {last['k']} samples.",
        )
    )
    found.append(_reflection_table(rounds))
    found += _scaling(rounds)
    found += _data_tables(summary)
    found += flip_galleries(run, rounds)
    return found


def _note(interval: dict) -> str:
    return f"[{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"


def _reflection_table(rounds: Sequence[dict]) -> report.Table:
    names = list(rounds[0]["differences"])
    rows = [
        [f"{name.replace('_', '-')} (points)", *[interval_text(m["differences"][name]) for m in rounds]]
        for name in names
    ]
    rows.append(
        ["selections outside the candidates", *[interval_text(m["out_of_candidates"]) for m in rounds]]
    )
    rows.append(
        [
            "greedy rationales without a readable answer",
            *[interval_text(m["unreadable"]) for m in rounds],
        ]
    )
    for name in rounds[0]["flips"]:
        cells = [
            f"{m['flips'][name]['wrong to right']} : {m['flips'][name]['right to wrong']}" for m in rounds
        ]
        rows.append([f"{name}, gained : lost", *cells])
    return report.Table("Reflection at test time", ["", *[f"round {m['round']}" for m in rounds]], rows)


def _scaling(rounds: Sequence[dict]) -> list[report.Section]:
    last = rounds[-1]
    if len(last["scaling"]) < 2:
        return []
    curves = {
        "majority": [(p["n"], p["majority"]) for p in last["scaling"]],
        "pass@n (oracle)": [(p["n"], p["pass"]) for p in last["scaling"]],
    }
    select = [(p["n"], p["self_select"]) for p in last["scaling"] if "self_select" in p]
    if select:
        curves["self-select"] = select
    return [
        report.Figure(
            f"More samples, round {last['round']}",
            lambda dark: plots.lines_with_intervals(
                curves, x="Samples per question", y="Accuracy (%)", dark=dark
            ),
            caption="The figures are in scaling.csv.",
        )
    ]


def _data_tables(summary: dict) -> list[report.Section]:
    found: list[report.Section] = []
    if summary["pools"]:
        keys = list(next(iter(summary["pools"].values())))
        rows = [[str(r), *[_shown(p[k]) for k in keys]] for r, p in summary["pools"].items()]
        found.append(
            report.Table(
                "Samples of the training questions", ["round", *[k.replace("_", " ") for k in keys]], rows
            )
        )
    if summary["rows"]:
        keys = sorted({k for counts in summary["rows"].values() for k, count in counts.items() if count})
        rows = [[str(r), *[str(counts.get(k, 0)) for k in keys]] for r, counts in summary["rows"].items()]
        found.append(report.Table("Training rows", ["round", *keys], rows))
    return found


def _shown(value: float | int) -> str:
    return f"{100 * value:.1f} %" if isinstance(value, float) else str(value)


def flip_galleries(run: "SelfTraining", rounds: Sequence[dict]) -> list[report.Section]:
    """Questions whose answers changed: over the rounds, and by refining in the last round."""
    graded = {m["round"]: _graded(run.folder(m["round"])) for m in rounds}
    first, last = rounds[0]["round"], rounds[-1]["round"]
    chosen: dict[str, list] = {name: [] for name in FLIPS}
    for number, question in enumerate(run.test):
        old, new = graded[first][number], graded[last][number]
        if not _right(old["greedy"]) and _right(new["greedy"]):
            chosen["gained"].append(
                (question, [(f"round {first}", old["greedy"]), (f"round {last}", new["greedy"])])
            )
        views = [("greedy", new["greedy"]), ("refined", new["self_refine"])]
        if _right(new["greedy"]) != _right(new["self_refine"]):
            chosen["refined" if _right(new["self_refine"]) else "spoiled"].append((question, views))
    return [
        report.Gallery(
            title,
            [_example(run, question, views) for question, views in chosen[name][:EXAMPLES]],
            note=f"{len(chosen[name])} of {len(run.test)} questions; the first {min(EXAMPLES, len(chosen[name]))}.",
            legend=False,
        )
        for name, title in FLIPS.items()
        if chosen[name]
    ]  # fmt: skip


def _right(candidate: dict) -> bool:
    return candidate["status"] == "right"


def _graded(folder: Path) -> list[dict]:
    return [row for _, row in read_jsonl(folder / "graded.jsonl")]


def _example(run: "SelfTraining", question: dict, views: Sequence[tuple[str, dict]]) -> report.Example:
    image = open_image(question["images"][0], run.image_root) if question["images"] else None
    answers = [
        report.AnswerView(name, [report.Piece(c["text"] or "(nothing)", truth=_right(c))], note=c["status"])
        for name, c in views
    ]
    return report.Example(image, question["question"], answers, note=f"Right answer: {question['answer']}")
