"""The page of one evaluation: figures, how they were made, what they cost, and answers to look at."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np

from ..runs import flatten
from .browsing import box_legend, browser, sample_picture, sample_views
from .metrics.chair import Chair
from .metrics.counting import CountMetric
from .report import Cell, Example, Figure, Gallery, Section, Table, Text, Tile, Tiles, render_report
from .scoring import phrase_verdicts, sample_matrix
from .tables import interval_text, published_by_category, quoted_from

_UNITS = {"length": " words"}
_TITLES = {
    "chair": "CHAIR",
    "chair_i": "CHAIR-i",
    "chair_s": "CHAIR-s",
    "cider": "CIDEr",
    "clair": "CLAIR",
    "f1": "F1",
    "acc50": "Accuracy at IoU 0.5",
    "mean_iou": "Mean IoU",
    "meteor": "METEOR",
}


def _headline(name: str, interval: dict, plain: Collection[str] = ()) -> Tile:
    title = _TITLES.get(name, name.replace("_", " ").capitalize())
    if name in _UNITS:
        return Tile(
            title,
            f"{interval['value']:.1f}",
            f"{interval['low']:.1f} to {interval['high']:.1f}{_UNITS[name]}",
        )
    if name in plain:
        return Tile(title, f"{interval['value']:.4g}", f"{interval['low']:.4g} to {interval['high']:.4g}")
    percent = {key: 100 * interval[key] for key in ("value", "low", "high")}
    return Tile(title, f"{percent['value']:.1f} %", f"{percent['low']:.1f} to {percent['high']:.1f} %")


def _metrics_table(summary: dict, metric: CountMetric) -> list[Section]:
    rows = []
    for name, interval in summary["metrics"].items():
        label = f"{name} (lower is better)" if name in metric.lower_is_better else name
        rows.append([label, Cell(interval_text(interval), "strong")])
    units = (
        ""
        if summary["units"] == summary["n"]
        else f" in {summary['units']} groups, which are resampled whole"
    )
    note = (
        f"n = {summary['n']} questions{units}; {summary['config']['level']:.0%} percentile bootstrap, "
        f"{summary['config']['rounds']} rounds, seed {summary['seed']}."
    )
    found: list[Section] = [Table("Metrics", ["metric", "value [interval]"], rows, note)]
    published = [row for row in summary["published"] if set(row["values"]) & set(summary["metrics"])]
    if published:
        names = [name for name in summary["metrics"] if any(name in row["values"] for row in published)]
        ours = [Cell("this run", "strong")]
        ours += [Cell(f"{summary['metrics'][name]['value']:.4g}", "strong") for name in names]
        others = [
            [
                row["system"],
                *(f"{row['values'][name]:.4g}" if name in row["values"] else "" for name in names),
            ]
            for row in published
        ]
        found.append(Table("As published", ["system", *names], [ours, *others], quoted_from(published)))
    if (by_category := published_by_category(summary)) is not None:
        name, categories, rows = by_category
        shown = [row for row in summary["published"] if row.get("by_category")]
        note = f"{name}. {quoted_from(shown)}"
        found.append(Table("As published, by category", ["system", *categories], rows, note))
    return found


def _category_table(summary: dict) -> list[Section]:
    groups = summary.get("by_category")
    if not groups:
        return []
    names = list(summary["metrics"])
    rows = [
        [group, str(values[names[0]]["n"]), *(interval_text(values[n], 2) for n in names)]
        for group, values in groups.items()
    ]
    return [Table("By category", ["category", "n", *names], rows)]


def _verifier(summary: dict, samples: Sequence[dict], metric: CountMetric) -> list[Section]:
    facts = summary["verifier"]
    if not facts:
        return []
    lines = (
        f"{facts['phrases']} phrases of these answers are judged by the metric; {facts['wrong_phrases']} of them are "
        "wrong."
    )
    if not facts["auc"]:
        return [Text("Verifier", lines + " Without both right and wrong phrases no ROC curve can be drawn.")]
    lines += (
        f" Mean P(</UN>) is {facts['mean_p_unconfident_wrong']:.3f} on the wrong ones and "
        f"{facts['mean_p_unconfident_right']:.3f} on the right ones."
    )
    if facts["auc"]["low"] is not None:
        lines += f" Area under the curve: {interval_text(facts['auc'])}, resampled by answer."
    rows = np.concatenate(phrase_verdicts(samples, metric))

    def draw(dark: bool):
        from .plots import verifier_roc

        return verifier_roc({summary["decoder"]: (rows[:, 0], rows[:, 1] > 0.5)}, dark=dark)

    caption = "P(</UN>) as a detector of wrong phrases among those of the returned answers."
    return [Text("Verifier", lines), Figure("", draw, caption)]


def _judge(summary: dict) -> list[Section]:
    judge = summary.get("judge")
    if not judge:
        return []
    usage = judge["usage"]
    rows = [
        ["model", judge["model"]],
        ["endpoint", judge["url"]],
        ["judge behind the published figures", judge["published"] or "not said"],
        ["prompt (digest)", judge["prompt_sha256"]],
        ["prompt", judge["prompt"]],
        [
            "verdicts asked for, from the ledger, failed",
            f"{usage['answered']}, {usage['cached']}, {usage['failed']}",
        ],
        ["tokens in, out", f"{usage['prompt_tokens']}, {usage['completion_tokens']}"],
        ["cost", f"{usage['cost']:.4g}"],
    ]
    return [Table("Judge", [], rows, numeric=False)]


def _gallery(
    title: str, note: str, chosen: Sequence[dict], metric: CountMetric, image_root: Path, system: str
) -> Gallery:
    examples = []
    for sample in chosen:
        truth = metric.truth_text(metric.reference_of(sample["reference"]))
        image = sample_picture(sample, image_root)
        views = sample_views(sample, metric, system)
        examples.append(Example(image, f"{sample['prompt']}  (truth: {truth})", views, f"id {sample['id']}"))
    words = ("in the picture", "not in the picture") if isinstance(metric, Chair) else ("right", "wrong")
    return Gallery(title, examples, f"{note} {box_legend(chosen)}".strip(), legend_words=words)


def write_eval_report(
    path: str | Path,
    summary: dict,
    samples: Sequence[dict],
    metric: CountMetric,
    image_root: str | Path,
    *,
    examples: int = 6,
    link: Callable[[int, dict], str] = lambda index, sample: "",
) -> Path:
    """Write the page of one run.

    Args:
        summary: as in summary.json.
        samples: all of the run's samples.
        examples: how many of the worst and of the best answers to show before the table of all.
        link: (index, sample) -> page about that answer beside this one, or an empty text.
    """
    counts = sample_matrix(samples, metric)
    order = sorted(range(len(samples)), key=lambda i: (metric.badness(counts[i]), i))
    best, worst = order[:examples], [i for i in order[::-1][:examples] if i not in order[:examples]]
    tau = f", τ = {summary['threshold']:g}" if summary["threshold"] is not None else ""
    system, root = summary["decoder"] + tau, Path(image_root)
    sections: list[Section] = [
        Tiles(
            "",
            [
                _headline(name, interval, metric.not_fractions)
                for name, interval in summary["metrics"].items()
            ],
        ),
        *_metrics_table(summary, metric),
        *_category_table(summary),
        *_verifier(summary, samples, metric),
    ]
    if worst:
        shown = [samples[i] for i in worst]
        sections.append(_gallery("Worst answers", "By the metric, worst first.", shown, metric, root, system))
    shown = [samples[i] for i in best]
    sections.append(_gallery("Best answers", "By the metric, best first.", shown, metric, root, system))
    sections.append(browser(samples, metric, root, system, link))
    sections += _judge(summary)
    cost = [[name.replace("_", " "), f"{value:.3g}"] for name, value in summary["cost"].items()]
    cost.append(["answers not fully verified", f"{summary['n_not_ok']} of {summary['n']}"])
    settings = [[key, str(value)] for key, value in flatten(summary["config"]).items()]
    installed = [[name, version] for name, version in summary["versions"].items()]
    sections += [
        Table(
            "Cost", ["", "per answer or ratio"], cost, "Counts of work, which do not depend on the machine."
        ),
        Table("Configuration", [], settings, numeric=False, folded=True),
        Table("Versions", [], installed, numeric=False, folded=True),
    ]
    subtitle = f"{summary['description']}. {summary['model']}, {system}, n = {summary['n']}"
    return render_report(f"{summary['spec']}: {summary['decoder']}", sections, path, subtitle=subtitle)
