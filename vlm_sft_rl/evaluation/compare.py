"""Are two runs on one benchmark different? Paired bootstrap differences over the questions both answered."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..io import read_json
from ..runs import RUN_FILE, read_samples
from .bootstrap import Interval
from .browsing import SHOWN, categories, choose, ranks, sample_picture, sample_views
from .judge import read_judgements
from .metrics import load_metric
from .metrics.counting import CountMetric
from .report import Browser, BrowserRow, Cell, Figure, Footer, Section, Table, Text, render_report
from .scoring import count_matrix, references, sample_matrix
from .tables import interval_text


def _run(folder: Path) -> dict:
    if not (folder / RUN_FILE).is_file():
        raise UserError(f"{folder}: no {RUN_FILE} in it. Give the output folder of `vlm-sft-rl eval`.")
    return read_json(folder / RUN_FILE)


def _data_dir(folder: Path) -> str | None:
    """Where the metric's own files were when the run was made."""
    path = folder / "summary.json"
    return read_json(path).get("config", {}).get("data_dir") if path.is_file() else None


def _add_judgements(dir_a: Path, samples_a: dict, dir_b: Path, samples_b: dict) -> None:
    judges = []
    for folder, samples in ((dir_a, samples_a), (dir_b, samples_b)):
        for identity, judgement in read_judgements(folder):
            if identity in samples:
                samples[identity]["judgement"] = judgement
        judge = read_json(folder / "summary.json")["judge"]
        judges.append((judge["model"], judge["prompt_sha256"]))
    if judges[0] != judges[1]:
        raise UserError(
            f"{dir_a} and {dir_b}: judged by different models or prompts ({judges[0]} and {judges[1]}). Judge both alike."
        )


@dataclass(frozen=True)
class Comparison:
    """Two runs question by question: `result` as `compare` returns it, and what it was computed from."""

    folder_a: Path
    folder_b: Path
    spec: dict
    metric: CountMetric
    samples_a: list[dict]
    samples_b: list[dict]
    intervals_a: dict[str, Interval]
    intervals_b: dict[str, Interval]
    result: dict


def compare(
    dir_a: str | Path, dir_b: str | Path, *, rounds: int = 1000, seed: int = 0, level: float = 0.95
) -> dict:
    """Differences a - b of every metric, with both runs resampled together question by question.

    Returns:
        `{"spec", "a", "b", "n", "rounds", "seed", "level", "metrics": {name: {"a", "b", "difference": {"value",
        "low", "high", "n"}, "excludes_zero"}}}`; print it with `tables.comparison_table`.

    Raises:
        UserError: the runs are not of the same benchmark and question file, or share no question.
    """
    return pair_runs(dir_a, dir_b, rounds=rounds, seed=seed, level=level).result


def pair_runs(
    dir_a: str | Path, dir_b: str | Path, *, rounds: int = 1000, seed: int = 0, level: float = 0.95
) -> Comparison:
    """`compare`, with the shared samples of both runs; `compare_report.write_comparison` draws it."""
    dir_a, dir_b = Path(dir_a), Path(dir_b)
    run_a, run_b = _run(dir_a), _run(dir_b)
    name_a, name_b = run_a["spec"]["name"], run_b["spec"]["name"]
    if name_a != name_b:
        raise UserError(
            f"{dir_a} ran {name_a!r} but {dir_b} ran {name_b!r}: only runs of one spec can be compared."
        )
    judged = ("questions", "metric", "metric_options", "reader_options", "prompt", "open_prompt", "regions")
    different = [key for key in judged if run_a["spec"].get(key) != run_b["spec"].get(key)]
    if different:
        raise UserError(
            f"{dir_a} and {dir_b}: the spec {name_a!r} changed between them ({', '.join(different)})."
        )
    if run_a["questions"] != run_b["questions"]:
        raise UserError(
            f"{dir_a} and {dir_b}: the question file of {name_a!r} changed between them. Run both again."
        )
    samples_a = {sample["id"]: sample for sample in read_samples(dir_a)}
    samples_b = {sample["id"]: sample for sample in read_samples(dir_b)}
    shared = [key for key in samples_a if key in samples_b]
    if not shared:
        raise UserError(f"{dir_a} and {dir_b}: no question was answered by both.")
    metric = load_metric(run_a["spec"]["metric"], run_a["spec"]["metric_options"], _data_dir(dir_a))
    if metric.prediction_field == "judgement":
        _add_judgements(dir_a, samples_a, dir_b, samples_b)
    shared_a, shared_b = [samples_a[key] for key in shared], [samples_b[key] for key in shared]
    counts_a, counts_b = count_matrix(shared_a, metric), count_matrix(shared_b, metric)
    differences = metric.differences(counts_a, counts_b, rounds, seed, level)
    rows = {}
    for name, difference in differences.items():
        statistic = metric.statistics[name]
        rows[name] = {
            "a": float(statistic(counts_a.sum(axis=0))),
            "b": float(statistic(counts_b.sum(axis=0))),
            "difference": difference.to_json(),
            "excludes_zero": difference.low > 0 or difference.high < 0,
        }
    result = {"spec": name_a, "a": str(dir_a), "b": str(dir_b), "n": len(shared)}
    result |= {"rounds": rounds, "seed": seed, "level": level, "metrics": rows}
    return Comparison(
        dir_a,
        dir_b,
        run_a["spec"],
        metric,
        shared_a,
        shared_b,
        metric.intervals(counts_a, rounds, seed, level),
        metric.intervals(counts_b, rounds, seed, level),
        json.loads(json.dumps(result)),
    )


# The page of one comparison: paired differences, both systems' intervals, and their answers side by side.
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
