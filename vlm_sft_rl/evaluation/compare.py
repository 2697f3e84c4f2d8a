"""Are two runs on one benchmark different? Paired bootstrap differences over the questions both answered."""

from dataclasses import dataclass
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
    Panels,
    Section,
    Table,
    Text,
    interval_text,
    render_report,
)
from .results import JUDGE, FinishedRun, read_results, read_run
from .scoring import count_matrix, references, sample_matrix

NAMES = ("new", "old")
DIFFERENCE = "new - old [interval]"


@dataclass(frozen=True)
class Comparison:
    """A new and an old run question by question: `result` as of `compare`, and of each run what it was computed from."""

    runs: tuple[FinishedRun, FinishedRun]
    metric: CountMetric
    samples: tuple[list[dict], list[dict]]
    intervals: tuple[dict[str, Interval], dict[str, Interval]]
    result: dict


def compare(
    new: str | Path, old: str | Path, *, rounds: int = 1000, seed: int = 0, level: float = 0.95
) -> dict:
    """Differences new - old of every metric, with both runs resampled together question by question.

    Returns:
        `{"spec", "new", "old", "n", "rounds", "seed", "level", "metrics": {name: {"new", "old", "difference": {"value",
        "low", "high", "n"}, "excludes_zero"}}}`; `comparison_table` shows it on a terminal.

    Raises UserError: the runs are not of the same benchmark and question file, or share no question.
    """
    return pair_runs(new, old, rounds=rounds, seed=seed, level=level).result


def pair_runs(
    new: str | Path, old: str | Path, *, rounds: int = 1000, seed: int = 0, level: float = 0.95
) -> Comparison:
    """`compare`, with the shared samples of both runs; `write_comparison` draws it."""
    runs = run_new, run_old = read_run(new), read_run(old)
    both = f"{run_new.folder} and {run_old.folder}"
    if run_new.spec.name != run_old.spec.name:
        raise UserError(
            f"{run_new.folder} ran {run_new.spec.name!r} but {run_old.folder} ran {run_old.spec.name!r}: only runs of one "
            "spec can be compared."
        )
    judged = ("questions", "metric", "metric_options", "reader_options", "prompt", "open_prompt", "regions")
    different = [key for key in judged if getattr(run_new.spec, key) != getattr(run_old.spec, key)]
    if different:
        raise UserError(
            f"{both}: the spec {run_new.spec.name!r} changed between them ({', '.join(different)})."
        )
    if run_new.manifest["questions"] != run_old.manifest["questions"]:
        raise UserError(
            f"{both}: the question file of {run_new.spec.name!r} changed between them. Run both again."
        )
    by_id = [{sample["id"]: sample for sample in run.samples} for run in runs]
    shared = [key for key in by_id[0] if key in by_id[1]]
    if not shared:
        raise UserError(f"{both}: no question was answered by both.")
    metric = run_new.metric
    if metric.prediction_field == "judgement":
        _add_judgements(runs, by_id)
    samples = tuple([answers[key] for key in shared] for answers in by_id)
    counts_new, counts_old = (count_matrix(answers, metric) for answers in samples)
    rows = {}
    for name, difference in metric.differences(counts_new, counts_old, rounds, seed, level).items():
        statistic = metric.statistics[name]
        rows[name] = {
            "new": float(statistic(counts_new.sum(axis=0))),
            "old": float(statistic(counts_old.sum(axis=0))),
            "difference": difference.to_json(),
            "excludes_zero": bool(difference.low > 0 or difference.high < 0),
        }
    result = {"spec": run_new.spec.name, "new": str(new), "old": str(old), "n": len(shared)}
    result |= {"rounds": rounds, "seed": seed, "level": level, "metrics": rows}
    intervals = tuple(metric.intervals(counts, rounds, seed, level) for counts in (counts_new, counts_old))
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
            f"{row['new']:.3f}",
            f"{row['old']:.3f}",
            interval_text(row["difference"], sign="+"),
            "*" if row["excludes_zero"] else "",
        ]
        for name, row in result["metrics"].items()
    ]
    return Table(
        f"{result['spec']}: new = {result['new']}, old = {result['old']}",
        ["metric", "new", "old", DIFFERENCE, ""],
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
    for name, summary, folder in zip(NAMES, summaries, folders, strict=True):
        tau = f", τ = {summary['threshold']:g}" if summary["threshold"] is not None else ""
        systems.append(f"{name.capitalize()}: {summary['model']}, {summary['decoder']}{tau} ({folder})")
    sections: list[Section] = [Text("", "\n\n".join(systems)), _differences(result, metric)]
    names = [name for name in metric.statistics if name not in metric.not_fractions][:_PANELS]
    if names:
        panels = intervals_by_system(dict(zip(NAMES, pairs.intervals, strict=True)), names)
        caption = "Each run by itself. Whether they differ is said by the table above, not by overlaps here."
        sections.append(Panels("Intervals", panels, caption, wide=True))
    sections.append(_side_by_side(pairs, root, shown))
    return render_report(
        f"{result['spec']}: new against old",
        sections,
        path,
        subtitle=f"{result['n']} questions that both runs answered",
        command=f"vlm-sft-rl eval compare {folders[0]} {folders[1]} --html {path}",
    )


def _differences(result: dict, metric: CountMetric) -> Table:
    rows = []
    for name, row in result["metrics"].items():
        new_is_better = (row["difference"]["value"] < 0) == (name in metric.lower_is_better)
        tone = "good" if new_is_better else "bad"
        if not row["excludes_zero"]:
            tone = "muted"
        elif name in metric.neither_is_better:
            tone = "plain"
        difference = Cell(interval_text(row["difference"], sign="+"), tone)
        label = metric_label(name, metric.lower_is_better)
        rows.append([label, f"{row['new']:.3f}", f"{row['old']:.3f}", difference])
    note = (
        "A positive difference means that the new run has the higher figure. Green: the new run is better, and the "
        "interval excludes 0. Red: the old one is. Grey: the interval contains 0. "
        f"Paired bootstrap over {result['n']} shared questions, {result['rounds']} rounds, {result['level']:.0%} "
        f"intervals, seed {result['seed']}."
    )
    return Table("Differences", ["metric", *NAMES, DIFFERENCE], rows, note)


def _side_by_side(pairs: Comparison, image_root: Path, shown: int) -> Browser:
    metric, (samples_new, samples_old) = pairs.metric, pairs.samples
    n, truths = len(samples_new), references(samples_new, metric)
    counts = [sample_matrix(samples, metric) for samples in pairs.samples]
    # both runs' answers in one order, so that two answers to a question differ by their places in it
    places = np.asarray(ranks([metric.badness(row) for matrix in counts for row in matrix]))
    gap = places[:n] - places[n:]
    chosen = choose([(abs(float(value)),) for value in gap], shown)
    rows = []
    for i in chosen:
        new, old = samples_new[i], samples_old[i]
        verdicts = [
            f"{name}: {metric.verdict(matrix[i])}" for name, matrix in zip(NAMES, counts, strict=True)
        ]
        rows.append(
            BrowserRow(
                id=f"{new['id']} · {', '.join(verdicts)}",
                image=sample_picture(new, image_root, located=False),
                question=new["prompt"],
                truth=metric.truth_text(truths[i]),
                answers=[
                    view
                    for name, sample, run in zip(NAMES, (new, old), pairs.runs, strict=True)
                    for view in sample_views(sample, metric, name, verifies=run.verifies)
                ],
                verdict="same" if gap[i] == 0 else "new better" if gap[i] < 0 else "old better",
                badness=float(gap[i]),
                categories=categories(new),
            )
        )
    note = "Sorted by verdict, by the metric's order of answers: first where the old run is better, last the new one."
    if len(chosen) < n:
        note += f" {len(chosen)} of {n} questions: those that differ most, and others spread evenly over the rest."
    return Browser("Answers of both", rows, note)
