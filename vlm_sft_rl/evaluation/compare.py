"""Are two runs on one benchmark different? Paired bootstrap differences over the questions both answered."""

import json
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..files import read_json
from .bootstrap import Interval
from .judging import read_judgements
from .metrics import load_metric
from .metrics.counting import CountMetric
from .run_config import RUN_FILE
from .samples import read_samples
from .scoring import count_matrix


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
