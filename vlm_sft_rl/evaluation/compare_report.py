"""The page of one comparison: paired differences, both systems' intervals, and their answers side by side."""

from pathlib import Path

import numpy as np

from ..errors import UserError
from ..files import read_json
from .browsing import SHOWN, categories, choose, ranks, sample_picture, sample_views
from .compare import Comparison
from .metrics.counting import CountMetric
from .report import Browser, BrowserRow, Cell, Figure, Footer, Section, Table, Text, render_report
from .scoring import references, sample_matrix
from .tables import interval_text

_PANELS = 4  # plots side by side that can still be read


def _tone(name: str, row: dict, metric: CountMetric) -> str:
    if not row["excludes_zero"]:
        return "muted"
    better = (row["difference"]["value"] < 0) == (name in metric.lower_is_better)
    return "good" if better else "bad"


def _differences(result: dict, metric: CountMetric) -> Table:
    rows = []
    for name, row in result["metrics"].items():
        label = f"{name} (lower is better)" if name in metric.lower_is_better else name
        difference = Cell(interval_text(row["difference"]), _tone(name, row, metric))
        rows.append([label, f"{row['a']:.4g}", f"{row['b']:.4g}", difference])
    note = (
        f"Paired bootstrap over {result['n']} shared questions, {result['rounds']} rounds, {result['level']:.0%} "
        f"intervals, seed {result['seed']}. Green: A is better, and the interval excludes 0. Red: B is."
    )
    return Table("Differences", ["metric", "A", "B", "A - B [interval]"], rows, note)


def _side_by_side(found: Comparison, image_root: Path, shown: int) -> Browser:
    metric = found.metric
    truths = references(found.samples_a, metric)
    counts = [sample_matrix(samples, metric) for samples in (found.samples_a, found.samples_b)]
    badness = [[metric.badness(row) for row in matrix] for matrix in counts]
    together = ranks([*badness[0], *badness[1]])
    n = len(truths)
    gap = np.asarray(together[:n]) - np.asarray(together[n:])
    chosen = choose([(abs(float(value)),) for value in gap], shown)
    rows = []
    for i in chosen:
        a, b = found.samples_a[i], found.samples_b[i]
        who = "same" if gap[i] == 0 else "A better" if gap[i] < 0 else "B better"
        said = [metric.verdict(matrix[i]) for matrix in counts]
        rows.append(
            BrowserRow(
                id=f"{a['id']} · A: {said[0]}, B: {said[1]}",
                image=sample_picture(a, image_root, located=False),
                question=a["prompt"],
                truth=metric.truth_text(truths[i]),
                answers=[*sample_views(a, metric, "A"), *sample_views(b, metric, "B")],
                verdict=who,
                badness=float(gap[i]),
                categories=categories(a),
            )
        )
    note = "Sorted by verdict: first where B is better by the metric's order of answers, last where A is."
    if len(chosen) < n:
        note += f" {len(chosen)} of {n} questions: those that differ most, and others spread evenly over the rest."
    return Browser("Answers of both", rows, note)


def write_comparison(path: str | Path, found: Comparison, *, shown: int = SHOWN) -> Path:
    """Write the page of a comparison.

    Args:
        found: what `compare.pair_runs` returned.
        shown: rows of the table of answers at most.

    Raises:
        UserError: a run has no summary, or pictures are no longer where they were.
    """
    summaries = [read_json(folder / "summary.json") for folder in (found.folder_a, found.folder_b)]
    result, metric = found.result, found.metric
    root = Path(summaries[0]["config"].get("data_dir", "."), found.spec["image_root"])
    if not root.is_dir():
        raise UserError(
            f"{root}: the pictures of {found.folder_a} were here and are not any more. Put them back."
        )
    names = [name for name in metric.statistics if name not in metric.not_fractions][:_PANELS]
    who = "\n\n".join(
        f"{letter}: {summary['model']}, {summary['decoder']}"
        + (f", τ = {summary['threshold']:g}" if summary["threshold"] is not None else "")
        + f" ({folder})"
        for letter, summary, folder in zip("AB", summaries, (found.folder_a, found.folder_b), strict=True)
    )
    sections: list[Section] = [Text("", who), _differences(result, metric)]
    if names:

        def draw(dark: bool):
            from .plots import intervals_by_system

            systems = {"A": found.intervals_a, "B": found.intervals_b}
            return intervals_by_system(systems, names, dark=dark)

        caption = (
            "Each system by itself. Whether they differ is said by the table above, not by overlaps here."
        )
        sections.append(Figure("Intervals", draw, caption))
    sections.append(_side_by_side(found, root, shown))
    command = f"vlm-sft-rl eval compare {found.folder_a} {found.folder_b} --html {path}"
    title = f"{result['spec']}: A against B"
    return render_report(title, sections, path, subtitle=f"n = {result['n']}", footer=Footer(command))
