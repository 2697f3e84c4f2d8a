"""What a run shows at its end: tables and report.html with the rounds and curves; of R3V scaling.csv and flipped answers."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ..data.images import open_image
from ..errors import next_steps, printable
from ..evaluation.pages import metric_label
from ..evaluation.plots import lines_with_intervals, loss_curves, rounds_with_intervals
from ..evaluation.report import (
    AnswerView,
    Example,
    Figure,
    Gallery,
    Panels,
    Piece,
    Section,
    Table,
    Text,
    Tile,
    Tiles,
    interval_text,
    percent,
    render_report,
)
from ..io import read_jsonl, write_text
from ..runs import training_log

if TYPE_CHECKING:
    from .loop import SelfTraining
    from .rewinds import Rewinds
    from .rounds import Rounds

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


def finish(run: "SelfTraining", summary: dict) -> None:
    """Print the table; write scaling.csv and report.html."""
    rounds = summary["rounds"]
    write_text(run.output / "scaling.csv", scaling_csv(rounds))
    figures = _by_round(
        "Rounds (%)", "system", {label: [m[key] for m in rounds] for key, label in SYSTEMS.items()}, rounds
    )
    shown = replace(
        figures,
        title=f"Accuracy (%), n = {summary['n']}, seed {summary['seed']}, {summary['variant']}",
        columns=["", *figures.columns[1:]],
        note="95 % bootstrap intervals over test questions",
    )
    run.console.print(shown.terminal())
    note = f"Majority, self-select and pass@k use k = {rounds[-1]['k']} samples."
    sections = [
        *_headline(rounds),
        replace(figures, note=note),
        _reflection(rounds),
        *_scaling(rounds[-1]),
        *_losses(run, rounds),
        *_data(summary),
        *_flips(run, rounds),
    ]
    render_report(
        f"Self-training by reflection: {summary['variant'].replace('_', ' ')}",
        sections,
        run.output / "report.html",
        subtitle=f"{summary['n']} test questions, {len(run.train)} training questions, seed {summary['seed']}; "
        "95 % bootstrap intervals over test questions.",
        command="vlm-sft-rl self-train",
    )
    _close(run, rounds)


def finish_rewinds(run: "Rewinds", summary: dict) -> None:
    """Print the table and the warnings; write report.html."""
    rounds = summary["rounds"]
    names = {
        name: metric_label(name, run.metric.lower_is_better) for name in rounds[0]["retrospective"]["metrics"]
    }
    greedy = {label: [m[name] for m in rounds] for name, label in names.items()}
    resampled = {
        label: [m["retrospective"]["metrics"][name] for m in rounds] for name, label in names.items()
    }
    areas = {
        "verifier's area, the start's phrases": [m["verifier_auc_at_start"] for m in rounds],
        **{
            f"the start's {name} phrases that are doubted": [
                "–" if (share := m["doubted_at_start"][name]) is None else f"{100 * share:.1f} %"
                for m in rounds
            ]
            for name in ("wrong", "right")
        },
        "verifier's area, own phrases": [m["verifier_auc"] for m in rounds],
        "of these wrong": [str((m["verifier"] or {}).get("wrong_phrases", 0)) for m in rounds],
    }
    note = "95 % bootstrap intervals over test questions"
    views = [
        _by_round("Greedy", "", greedy | areas, rounds, interval_text),
        _by_round("Retrospective", "", resampled, rounds, interval_text),
    ]
    for view in views:
        title = f"{view.title}, {summary['spec']}, n = {summary['n']}, seed {summary['seed']}"
        run.console.print(replace(view, title=title, note=note).terminal())
    run.warn(summary["warnings"])
    shares = {
        label: [(m["round"], value) for m, value in zip(rounds, values, strict=True)]
        for label, values in greedy.items()
        if all(value["high"] <= 1 for value in values)
    }
    curves = []
    if shares and len(rounds) > 1:
        curves = [Panels("Greedy answers (%) by round", rounds_with_intervals(shares), note)]
    sections: list[Section] = [
        *([Text("Warnings", "\n\n".join(summary["warnings"]))] if summary["warnings"] else []),
        *curves,
        *views,
        *_losses(run, rounds),
        *_counts("Training rows", summary["rows"]),
    ]
    render_report(
        "Self-training on rewinds",
        sections,
        run.output / "report.html",
        subtitle=f"{summary['n']} test questions, {len(run.pictures)} pictures without labels, seed {summary['seed']}; "
        f"{note}.",
        command="vlm-sft-rl self-train",
    )
    _close(run, rounds)


def _close(run: "Rounds", rounds: Sequence[dict]) -> None:
    run.console.print(f"Written to {run.output}", highlight=False)
    model = run.model(rounds[-1]["round"])
    steps = {
        "see how it went": f"open {run.output / 'report.html'}",
        "ask the last model": ("generate", "--model", model, "--image", "PICTURE", "--prompt", "QUESTION"),
    }
    run.console.print(printable(next_steps(steps)), highlight=False, markup=False, soft_wrap=True)


def scaling_csv(rounds: Sequence[dict]) -> str:
    """Lines `round, n, method, value, low, high` for n = 1…K samples; self-select at its own k."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("round", "n", "method", "value", "low", "high"))
    for metrics in rounds:
        for point in metrics["scaling"]:
            for method in ("majority", "pass", "self_select"):
                if method in point:
                    interval = [point[method][key] for key in ("value", "low", "high")]
                    writer.writerow((metrics["round"], point["n"], method, *interval))
    return out.getvalue()


def _by_round(
    title: str,
    corner: str,
    lines: Mapping[str, Sequence[dict | str | None]],
    rounds: Sequence[dict],
    written: Callable[[dict], str] = percent,
) -> Table:
    """A column for each round; a line has an interval, text, or nothing for each."""

    def cell(value: dict | str | None) -> str:
        if isinstance(value, dict):  # an area that few resamples have is without ends
            return written(value) if value["low"] is not None else f"{value['value']:.3f}"
        return value or "–"

    rows = [[label, *map(cell, values)] for label, values in lines.items()]
    return Table(title, [corner, *[f"round {m['round']}" for m in rounds]], rows)


def _headline(rounds: Sequence[dict]) -> list[Section]:
    first, last = rounds[0], rounds[-1]
    tiles = []
    for metrics, key in [(first, "greedy"), (last, "greedy"), (last, "self_select")][len(rounds) == 1 :]:
        value, ends = percent(metrics[key]).split(" ", 1)
        tiles.append(Tile(f"{SYSTEMS[key]}, round {metrics['round']}", f"{value} %", ends))
    unreadable = f"{100 * last['unreadable']['value']:.1f} %"
    tiles.append(Tile("greedy rationales without a readable answer", unreadable))
    sections: list[Section] = [Tiles("Result", tiles)]
    if len(rounds) > 1:
        curves = {
            label: [(m["round"], m[key]) for m in rounds] for key, label in SYSTEMS.items() if key != "sample"
        }
        sections.append(
            Panels(
                "Accuracy (%) by round",
                rounds_with_intervals(curves),
                "Bars are 95 % bootstrap intervals over the test questions; all charts have one scale.",
            )
        )
    return sections


def _reflection(rounds: Sequence[dict]) -> Table:
    lines: dict[str, list[dict | str]] = {
        f"{name.replace('_', '-').replace(' - ', ' minus ')} (points)": [
            interval_text(m["differences"][name], 1, 100, "+") for m in rounds
        ]
        for name in rounds[0]["differences"]
    }
    lines["selections outside the candidates (%)"] = [m["out_of_candidates"] for m in rounds]
    lines["greedy rationales without a readable answer (%)"] = [m["unreadable"] for m in rounds]
    for name in rounds[0]["flips"]:
        flips = [m["flips"][name] for m in rounds]
        lines[f"{name}, gained : lost"] = [f"{f['wrong to right']} : {f['right to wrong']}" for f in flips]
    return _by_round("Reflection at test time", "", lines, rounds)


def _scaling(last: dict) -> list[Section]:
    points = last["scaling"]
    if len(points) < 2:
        return []
    labels = {"majority": "majority", "pass": "pass@n (oracle)", "self_select": "self-select"}
    curves = {label: [(p["n"], p[key]) for p in points if key in p] for key, label in labels.items()}
    curves = {label: curve for label, curve in curves.items() if curve}
    draw = partial(lines_with_intervals, curves, x="Samples per question", y="Accuracy (%)")
    return [Figure(f"More samples, round {last['round']}", draw, caption="The figures are in scaling.csv.")]


def _losses(run: "Rounds", rounds: Sequence[dict]) -> list[Section]:
    """A small chart for each training; those of one objective have one scale."""
    charts = {}
    for folder, objective in (("train", "SFT"), ("dpo", "DPO")):
        places = {m["round"]: run.folder(m["round"]) / folder for m in rounds}
        logs = {
            f"{objective}, round {number}": training_log(place, "Remove it, and give the same command again.")
            for number, place in places.items()
            if place.is_dir()
        }
        charts |= loss_curves(logs)
    if not charts:
        return []
    caption = "In nats, over training steps; the charts of one objective have one scale."
    return [Panels("Training loss", charts, caption)]


def _data(summary: dict) -> list[Section]:
    tables: list[Section] = []
    if pools := summary["pools"]:
        keys = list(next(iter(pools.values())))
        rows = [
            [str(number), *[f"{100 * p[k]:.1f} %" if isinstance(p[k], float) else str(p[k]) for k in keys]]
            for number, p in pools.items()
        ]
        columns = ["round", *[key.replace("_", " ") for key in keys]]
        tables.append(Table("Samples of the training questions", columns, rows))
    return tables + _counts("Training rows", summary["rows"])


def _counts(title: str, counts: Mapping[int, Mapping[str, int]]) -> list[Section]:
    """A table of counts, a line for each round."""
    keys = sorted({key for row in counts.values() for key, count in row.items() if count})
    rows = [[str(number), *[str(row.get(key, 0)) for key in keys]] for number, row in counts.items()]
    return [Table(title, ["round", *keys], rows)] if rows else []


def _flips(run: "SelfTraining", rounds: Sequence[dict]) -> list[Section]:
    """Questions whose answers changed: over the rounds, and by refining in the last round."""
    first, last = rounds[0]["round"], rounds[-1]["round"]
    before, after = ([row for _, row in read_jsonl(run.folder(n) / "graded.jsonl")] for n in (first, last))
    gained, refined, spoiled = [], [], []
    for question, old, new in zip(run.test, before, after, strict=True):
        greedy_right, refined_right = _is_right(new["greedy"]), _is_right(new["self_refine"])
        if greedy_right and not _is_right(old["greedy"]):
            views = {f"round {first}": old["greedy"], f"round {last}": new["greedy"]}
            gained.append((question, views))
        if greedy_right != refined_right:
            views = {"greedy": new["greedy"], "refined": new["self_refine"]}
            (refined if refined_right else spoiled).append((question, views))
    galleries = []
    for title, chosen in (
        ("Became right over the rounds", gained),
        ("Refined from wrong to right", refined),
        ("Refined from right to wrong", spoiled),
    ):
        if chosen:
            examples = [_example(run, question, views) for question, views in chosen[:EXAMPLES]]
            note = f"{len(chosen)} of {len(run.test)} questions; the first {len(examples)}."
            galleries.append(Gallery(title, examples, note=note, legend=False))
    return galleries


def _is_right(candidate: dict) -> bool:
    return candidate["status"] == "right"


def _example(run: "SelfTraining", question: dict, views: dict[str, dict]) -> Example:
    image = open_image(question["images"][0], run.image_root) if question["images"] else None
    answers = [
        AnswerView(
            name, [Piece(answer["text"] or "(nothing)", truth=_is_right(answer))], note=answer["status"]
        )
        for name, answer in views.items()
    ]
    return Example(image, question["question"], answers, note=f"Right answer: {question['answer']}")
