"""What the demo shows at its end: a table on the terminal, summary.json, report.html with plots and traced examples."""

from itertools import islice
from pathlib import Path

import numpy as np
from rich.table import Table as TerminalTable

from ..data.images import open_image
from ..decoding.trace import write_trace_html
from ..evaluation import plots, report
from ..evaluation.compare import compare
from ..evaluation.marking import answer_view
from ..evaluation.metrics import load_metric
from ..evaluation.run_config import versions
from ..evaluation.scoring import phrase_verdicts
from ..evaluation.specs import load_spec
from ..evaluation.sweep import run_point, sweep, useful_thresholds
from ..evaluation.systems import answer_of
from ..evaluation.tables import interval_text
from ..files import read_json, write_json

SYSTEMS = {
    "base": "base",
    "control": "control",
    "reverse_greedy": "REVERSE, greedy",
    "reverse_drop": "REVERSE + drop",
    "reverse_stop": "REVERSE + stop",
    "reverse_paper": "REVERSE + paper's resampling",
    "reverse": "REVERSE + resampling",
}
ON_POLICY = {"on_policy_greedy": "on-policy, greedy", "on_policy": "on-policy + resampling"}
LEGEND = (
    "base and control: greedy captions, before and after fine-tuning on the same true captions without tags. drop leaves "
    "out every doubtful phrase of the greedy answer, stop ends before the first. The paper's resampling raises the "
    "temperature to at most 0.5 and rewrites the query; resampling is the setting chosen on validation scenes, with "
    "temperatures up to 1."
)
METRICS = ("chair_i", "chair_s", "coverage", "length")
TRACES = 5


def finish(demo) -> dict:
    """Write summary.json, the traces and report.html; print the table; return the summary."""
    from .demo_reverse import THRESHOLDS

    systems = SYSTEMS | (ON_POLICY if demo.on_policy else {})
    runs = {name: demo.summary(name) for name in systems}
    main = runs["reverse"]
    summary = {
        "method": "reverse",
        "n": main["n"],
        "seed": demo.seed,
        "seconds": round(sum(demo.stages.seconds.values()), 1),
        "threshold": main["threshold"],
        "rewrite_query": demo.choice("reverse")["rewrite_query"],
        "systems": {
            name: {key: _short(run["metrics"][key]) for key in METRICS} for name, run in runs.items()
        },
        "yes_no": {
            name: {
                key: _short(demo.summary(name, "pocket_yesno")["metrics"][key]) for key in ("accuracy", "f1")
            }
            for name in ("base", "control", "reverse")
        },
        "differences": _differences(demo),
        "verifier": runs["reverse_greedy"]["verifier"],
        "cost": {
            key: main["cost"][key] for key in ("tokens_forwarded_per_kept_token", "image_encodes_per_answer")
        }
        | {
            "greedy_tokens_forwarded_per_kept_token": runs["control"]["cost"][
                "tokens_forwarded_per_kept_token"
            ]
        },
        "not_fully_verified": main["n_not_ok"],
        "stages": demo.stages.seconds,
        "stale_stages": demo.stages.stale,
        "versions": versions(),
    }
    write_json(demo.folder / "summary.json", summary)
    spec = load_spec("pocket_captions")
    metric = load_metric(spec.metric, spec.metric_options)
    traces = _write_traces(demo, metric, main["threshold"])
    page = _write_report(demo, systems, summary, metric, traces, THRESHOLDS)
    _print(demo, systems, summary, page)
    return summary


def _short(interval: dict) -> dict:
    return {key: interval[key] for key in ("value", "low", "high")}


def _differences(demo) -> dict:
    """Paired differences, question by question, of retrospective resampling against base and control."""
    found = {}
    for other in ("base", "control"):
        result = compare(demo.run_dir("reverse"), demo.run_dir(other), seed=demo.seed)
        found[f"reverse_minus_{other}"] = {
            name: _short(result["metrics"][name]["difference"]) for name in METRICS
        }
    return found


def _write_traces(demo, metric, threshold: float) -> list[tuple[dict, Path]]:
    """Pages of the first answers in which something was rejected and the control hallucinates."""
    plain = {sample["id"]: sample for sample in demo.samples("control")}

    def shows_help(sample: dict) -> bool:
        if not any(event["kind"] == "reject" for event in sample["trace"]):
            return False
        control = metric.counts([plain[sample["id"]]["answer"]], [sample["reference"]["objects"]])[0]
        return metric.badness(control)[0] > 0

    chosen = islice(filter(shows_help, demo.samples("reverse")), TRACES)
    pages = []
    for number, sample in enumerate(chosen, 1):
        path = demo.folder / "traces" / f"{number}-{sample['id']}.html"
        write_trace_html(answer_of(sample, threshold), open_image(sample["images"][0], demo.world), path)
        pages.append((sample, path))
    return pages


def _write_report(demo, systems: dict, summary: dict, metric, traces: list, thresholds) -> Path:
    greedy = demo.samples("reverse_greedy")
    curves = {"retrospective": [run_point(demo.run_dir(f"reverse-{tau:g}")) for tau in thresholds]}
    taus = useful_thresholds(greedy)
    for mode in ("drop", "stop"):
        curves[mode] = sweep(greedy, metric, mode, taus, seed=demo.seed)
    points = {name: run_point(demo.run_dir(name)) for name in ("base", "control")}
    points["REVERSE greedy"] = run_point(demo.run_dir("reverse_greedy"))
    history = read_json(demo.models / "reverse" / "trainer_state.json")["log_history"]
    rows = [
        [
            label,
            *(report.Cell(interval_text(summary["systems"][name][key]), _tone(name)) for key in METRICS),
        ]
        for name, label in systems.items()
    ]
    tiles = [
        report.Tile(label, f"{100 * summary['systems'][name]['chair_i']['value']:.1f} %", note, tone)
        for label, name, note, tone in (
            ("Base", "base", "of named objects are not there", "bad"),
            ("Control", "control", "after plain fine-tuning", "bad"),
            ("REVERSE", "reverse", "with retrospective resampling", "good"),
        )
    ]
    area = (summary["verifier"] or {}).get("auc")
    sections = [
        report.Tiles("Hallucinated objects (CHAIR-i)", tiles),
        report.Text(
            "What was done",
            "A small vision-language model, pre-trained on rendered scenes in which some objects usually stand together, "
            "names the partner of an object even where it is missing. REVERSE (arXiv 2504.13169) teaches it to close each "
            "phrase with </CN> (grounded) or </UN> (hallucinated), and rewinds whatever is doubtful while it answers.\n\n"
            "The control saw the same images and the same true captions for as many steps, without tags. The threshold "
            f"τ = {summary['threshold']:g} and decoding {'with' if summary['rewrite_query'] else 'without'} query rewriting "
            "were chosen on validation scenes. These are results of the pocket model: they "
            "show the direction of the method, not the figures of a 7B model.",
        ),
        report.Table(
            "Systems",
            ["system", *METRICS],
            rows,
            f"n = {summary['n']} unbiased test scenes, seed {summary['seed']}; 95 % percentile bootstrap over scenes. "
            + LEGEND,
        ),
        report.Figure(
            "",
            plots.both_schemes(
                plots.intervals_by_system,
                {label: _intervals(demo, name) for name, label in systems.items()},
                ("chair_i", "chair_s", "coverage"),
            ),
        ),
        report.Figure(
            "What a threshold buys and costs",
            plots.both_schemes(plots.tau_tradeoff, curves, points),
            "Down is fewer hallucinations, right is more objects named. Each line follows τ on the test scenes; the "
            "threshold of the table was chosen elsewhere.",
        ),
        *_verifier(area, demo, metric),
        report.Figure(
            "Training",
            plots.both_schemes(
                plots.training_curves,
                history,
                {
                    "verifier_auc": "ROC area at own phrases",
                    "verifier_p_wrong": "P(</UN>) on wrong phrases",
                    "verifier_p_right": "P(</UN>) on right phrases",
                },
            ),
            "Measured every 100 steps on validation scenes.",
        ),
        _gallery(demo, metric, traces),
        report.Table(
            "Stages",
            ["stage", "seconds"],
            [[k, f"{v:.0f}"] for k, v in demo.stages.seconds.items()],
            folded=True,
        ),
    ]
    return report.render_report(
        "REVERSE on the pocket world",
        sections,
        demo.folder / "report.html",
        subtitle=f"{summary['n']} test scenes, seed {summary['seed']}, {summary['seconds'] / 60:.1f} minutes"
        + "".join(f"; by another version: {name}" for name in summary["stale_stages"]),
        footer=report.Footer(demo.command),
    )


def _verifier(area: dict | None, demo, metric) -> list:
    if not area or area["low"] is None:
        text = "All phrases of the greedy captions are right, or all are wrong: no ROC curve can be drawn."
        return [report.Text("The verifier", text)]
    verdicts = np.concatenate(phrase_verdicts(demo.samples("reverse_greedy"), metric))
    curves = {"own phrases": (verdicts[:, 0], verdicts[:, 1] > 0.5)}
    caption = f"P(</UN>) as a detector of wrong phrases in the model's own greedy captions; area {interval_text(area)}."
    return [report.Figure("The verifier", plots.both_schemes(plots.verifier_roc, curves), caption)]


def _tone(name: str) -> str:
    return "strong" if name == "reverse" else "plain"


def _intervals(demo, name: str) -> dict:
    return run_point(demo.run_dir(name)).metrics


def _gallery(demo, metric, traces: list) -> report.Gallery:
    answers = {name: {s["id"]: s for s in demo.samples(name)} for name in ("base", "control")}
    examples = []
    for sample, path in traces:
        views = [answer_view(name, answers[name][sample["id"]], metric) for name in answers]
        views.append(answer_view("REVERSE", sample, metric))
        truth = ", ".join(sample["reference"]["objects"])
        examples.append(
            report.Example(
                open_image(sample["images"][0], demo.world),
                f"{sample['prompt']}  (there: {truth})",
                views,
                "how this answer came about",
                f"traces/{path.name}",
            )
        )
    note = "The first test scenes in which the control is wrong and the verifier rejected something, in file order."
    return report.Gallery("Examples", examples, note)


def _print(demo, systems: dict, summary: dict, page: Path) -> None:
    table = TerminalTable(title=f"Captions of {summary['n']} unbiased test scenes (95 % bootstrap intervals)")
    for column in ("system", "CHAIR-i ↓", "CHAIR-s ↓", "coverage ↑"):
        table.add_column(column, justify="left" if column == "system" else "right")
    for name, label in systems.items():
        values = [interval_text(summary["systems"][name][key]) for key in METRICS[:3]]
        table.add_row(label, *values, style="bold green" if name == "reverse" else "")
    demo.console.print(table)
    cost = summary["cost"]
    demo.console.print(
        f"τ = {summary['threshold']:g}; {cost['tokens_forwarded_per_kept_token']:.2f} tokens forwarded per kept token "
        f"(greedy {cost['greedy_tokens_forwarded_per_kept_token']:.2f}), {cost['image_encodes_per_answer']:.2f} image "
        f"encodes per answer; {summary['seconds']:.0f} s"
    )
    demo.console.print(f"Report: {page}", highlight=False)
