"""Are two runs on one benchmark different? Paired bootstrap differences over the questions both answered."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ..errors import UserError
from .bootstrap import Interval
from .judge import read_judgements
from .metrics.counting import CountMetric
from .pages import SHOWN, categories, choose, metric_label, ranks, sample_picture, sample_views
from .report import (
    Browser,
    BrowserRow,
    Cell,
    Figure,
    Section,
    Table,
    Text,
    interval_text,
    render_report,
)
from .results import JUDGE, FinishedRun, read_results, read_run
from .scoring import count_matrix, references, sample_matrix


@dataclass(frozen=True)
class Comparison:
    """Two runs question by question: `result` as `compare` returns it, and of each run what it was computed from."""

    runs: tuple[FinishedRun, FinishedRun]
    metric: CountMetric
    samples: tuple[list[dict], list[dict]]
    intervals: tuple[dict[str, Interval], dict[str, Interval]]
    result: dict


def compare(
    dir_a: str | Path, dir_b: str | Path, *, rounds: int = 1000, seed: int = 0, level: float = 0.95
) -> dict:
    """Differences a - b of every metric, with both runs resampled together question by question.

    Returns:
        `{"spec", "a", "b", "n", "rounds", "seed", "level", "metrics": {name: {"a", "b", "difference": {"value",
        "low", "high", "n"}, "excludes_zero"}}}`; `comparison_table` shows it on a terminal.

    Raises UserError: the runs are not of the same benchmark and question file, or share no question.
    """
    return pair_runs(dir_a, dir_b, rounds=rounds, seed=seed, level=level).result


def pair_runs(
    dir_a: str | Path, dir_b: str | Path, *, rounds: int = 1000, seed: int = 0, level: float = 0.95
) -> Comparison:
    """`compare`, with the shared samples of both runs; `write_comparison` draws it."""
    runs = run_a, run_b = read_run(dir_a), read_run(dir_b)
    both = f"{run_a.folder} and {run_b.folder}"
    if run_a.spec.name != run_b.spec.name:
        raise UserError(
            f"{run_a.folder} ran {run_a.spec.name!r} but {run_b.folder} ran {run_b.spec.name!r}: only runs of one spec can "
            "be compared."
        )
    judged = ("questions", "metric", "metric_options", "reader_options", "prompt", "open_prompt", "regions")
    different = [key for key in judged if getattr(run_a.spec, key) != getattr(run_b.spec, key)]
    if different:
        raise UserError(
            f"{both}: the spec {run_a.spec.name!r} changed between them ({', '.join(different)})."
        )
    if run_a.manifest["questions"] != run_b.manifest["questions"]:
        raise UserError(
            f"{both}: the question file of {run_a.spec.name!r} changed between them. Run both again."
        )
    by_id = [{sample["id"]: sample for sample in run.samples} for run in runs]
    shared = [key for key in by_id[0] if key in by_id[1]]
    if not shared:
        raise UserError(f"{both}: no question was answered by both.")
    metric = run_a.metric
    if metric.prediction_field == "judgement":
        _add_judgements(runs, by_id)
    samples = tuple([answers[key] for key in shared] for answers in by_id)
    counts_a, counts_b = (count_matrix(answers, metric) for answers in samples)
    rows = {}
    for name, difference in metric.differences(counts_a, counts_b, rounds, seed, level).items():
        statistic = metric.statistics[name]
        rows[name] = {
            "a": float(statistic(counts_a.sum(axis=0))),
            "b": float(statistic(counts_b.sum(axis=0))),
            "difference": difference.to_json(),
            "excludes_zero": bool(difference.low > 0 or difference.high < 0),
        }
    result = {"spec": run_a.spec.name, "a": str(dir_a), "b": str(dir_b), "n": len(shared)}
    result |= {"rounds": rounds, "seed": seed, "level": level, "metrics": rows}
    intervals = tuple(metric.intervals(counts, rounds, seed, level) for counts in (counts_a, counts_b))
    return Comparison(runs, metric, samples, intervals, result)


def _add_judgements(runs: tuple[FinishedRun, FinishedRun], by_id: list[dict]) -> None:
    judges = []
    for run, samples in zip(runs, by_id, strict=True):
        for identity, judgement in read_judgements(run.folder):
            if identity in samples:
                samples[identity]["judgement"] = judgement
        judge = read_results(run.folder, judge=JUDGE)["judge"]
        judges.append((judge["model"], judge["prompt_sha256"]))
    if judges[0] != judges[1]:
        raise UserError(
            f"{runs[0].folder} and {runs[1].folder}: judged by different models or prompts ({judges[0]} and {judges[1]}). "
            "Judge both alike."
        )


def comparison_table(result: dict) -> Table:
    """What `compare` returns, for the terminal."""
    rows = [
        [
            name,
            f"{row['a']:.3f}",
            f"{row['b']:.3f}",
            interval_text(row["difference"]),
            "*" if row["excludes_zero"] else "",
        ]
        for name, row in result["metrics"].items()
    ]
    return Table(
        f"{result['spec']}: A = {result['a']}, B = {result['b']}",
        ["metric", "A", "B", "A - B [interval]", ""],
        rows,
        f"paired bootstrap over {result['n']} shared questions ({result['rounds']} rounds, {result['level']:.0%} "
        f"intervals, seed {result['seed']}); * = the interval excludes 0",
    )


# --- The page: paired differences, both systems' intervals, and their answers side by side ---

_PANELS = 4  # plots side by side that can still be read


def write_comparison(path: str | Path, pairs: Comparison, *, shown: int = SHOWN) -> Path:
    """Write the page of a comparison.

    Args:
        pairs: what `pair_runs` returned.
        shown: rows of the table of answers at most.

    Raises UserError: a run has no summary, or pictures are no longer where they were.
    """
    from .plots import intervals_by_system

    result, metric = pairs.result, pairs.metric
    folders = [run.folder for run in pairs.runs]
    summaries = [read_results(folder, model=str) for folder in folders]
    root = Path(summaries[0]["config"].get("data_dir", "."), pairs.runs[0].spec.image_root)
    if not root.is_dir():
        raise UserError(
            f"{root}: the pictures of {folders[0]} were here and are not any more. Put them back."
        )
    systems = []
    for letter, summary, folder in zip("AB", summaries, folders, strict=True):
        tau = f", τ = {summary['threshold']:g}" if summary["threshold"] is not None else ""
        systems.append(f"{letter}: {summary['model']}, {summary['decoder']}{tau} ({folder})")
    sections: list[Section] = [Text("", "\n\n".join(systems)), _differences(result, metric)]
    names = [name for name in metric.statistics if name not in metric.not_fractions][:_PANELS]
    if names:
        draw = partial(intervals_by_system, dict(zip("AB", pairs.intervals, strict=True)), names)
        caption = (
            "Each system by itself. Whether they differ is said by the table above, not by overlaps here."
        )
        sections.append(Figure("Intervals", draw, caption))
    sections.append(_side_by_side(pairs, root, shown))
    return render_report(
        f"{result['spec']}: A against B",
        sections,
        path,
        subtitle=f"n = {result['n']}",
        command=f"vlm-sft-rl eval compare {folders[0]} {folders[1]} --html {path}",
    )


def _differences(result: dict, metric: CountMetric) -> Table:
    rows = []
    for name, row in result["metrics"].items():
        a_is_better = (row["difference"]["value"] < 0) == (name in metric.lower_is_better)
        tone = "muted" if not row["excludes_zero"] else "good" if a_is_better else "bad"
        difference = Cell(interval_text(row["difference"]), tone)
        rows.append(
            [metric_label(name, metric.lower_is_better), f"{row['a']:.4g}", f"{row['b']:.4g}", difference]
        )
    note = (
        f"Paired bootstrap over {result['n']} shared questions, {result['rounds']} rounds, {result['level']:.0%} "
        f"intervals, seed {result['seed']}. Green: A is better, and the interval excludes 0. Red: B is."
    )
    return Table("Differences", ["metric", "A", "B", "A - B [interval]"], rows, note)


def _side_by_side(pairs: Comparison, image_root: Path, shown: int) -> Browser:
    metric, (samples_a, samples_b) = pairs.metric, pairs.samples
    n, truths = len(samples_a), references(samples_a, metric)
    counts = [sample_matrix(samples, metric) for samples in pairs.samples]
    # both runs' answers in one order, so that two answers to a question differ by their places in it
    places = np.asarray(ranks([metric.badness(row) for matrix in counts for row in matrix]))
    gap = places[:n] - places[n:]
    chosen = choose([(abs(float(value)),) for value in gap], shown)
    rows = []
    for i in chosen:
        a, b = samples_a[i], samples_b[i]
        verdict_a, verdict_b = (metric.verdict(matrix[i]) for matrix in counts)
        rows.append(
            BrowserRow(
                id=f"{a['id']} · A: {verdict_a}, B: {verdict_b}",
                image=sample_picture(a, image_root, located=False),
                question=a["prompt"],
                truth=metric.truth_text(truths[i]),
                answers=[
                    view
                    for letter, sample, run in zip("AB", (a, b), pairs.runs, strict=True)
                    for view in sample_views(sample, metric, letter, verifies=run.verifies)
                ],
                verdict="same" if gap[i] == 0 else "A better" if gap[i] < 0 else "B better",
                badness=float(gap[i]),
                categories=categories(a),
            )
        )
    note = "Sorted by verdict: first where B is better by the metric's order of answers, last where A is."
    if len(chosen) < n:
        note += f" {len(chosen)} of {n} questions: those that differ most, and others spread evenly over the rest."
    return Browser("Answers of both", rows, note)
