"""From samples to the figures of `summary.json`."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ..data.tags import NO_PHRASE, NOT_VERIFIED, VERIFIED, verification
from ..errors import UserError
from ..roc import roc_auc
from .bootstrap import Interval, bootstrap_groups, mean_of_groups
from .metrics.counting import CountMetric


def references(samples: Sequence[dict], metric: CountMetric) -> list:
    """The metric's reference of every sample.

    Raises UserError: a sample lacks the metric's ground truth; the sample is named.
    """
    truths = []
    for sample in samples:
        try:
            truths.append(metric.reference_of(sample["reference"]))
        except UserError as error:
            raise UserError(f"sample {sample['id']!r}: {error}") from error
    return truths


def predictions(samples: Sequence[dict], metric: CountMetric) -> list:
    """What of every sample the metric scores."""
    return [metric.prediction_of(sample) for sample in samples]


def count_matrix(samples: Sequence[dict], metric: CountMetric) -> np.ndarray:
    """Counts of every unit (answer or group of answers), `(units, columns)`.

    Raises UserError: a sample lacks the metric's ground truth.
    """
    return metric.counts(predictions(samples, metric), references(samples, metric))


def sample_matrix(samples: Sequence[dict], metric: CountMetric) -> np.ndarray:
    """What the metric counts in every single answer, `(n, k)`."""
    return metric.per_sample(predictions(samples, metric), references(samples, metric))


def to_json(intervals: dict[str, Interval]) -> dict[str, dict]:
    return {name: interval.to_json() for name, interval in intervals.items()}


def phrase_verdicts(samples: Sequence[dict], metric: CountMetric) -> list[np.ndarray]:
    """Per answer an array `(phrases, 2)` of P(</UN>) and whether the phrase is wrong.

    Phrases the metric does not judge are left out, and answers without judged phrases give empty arrays.
    """
    graded = []
    for sample in samples:
        reference = metric.reference_of(sample["reference"])
        rows = []
        for span in sample["spans"]:
            right = metric.grade(span["text"], reference)
            if right is not None:
                rows.append((span["p_unconfident"], float(not right)))
        graded.append(np.asarray(rows, dtype=float).reshape(len(rows), 2))
    return graded


def verifier_summary(
    samples: Sequence[dict], metric: CountMetric, rounds: int = 100, seed: int = 0
) -> dict | None:
    """Area under the ROC curve of P(</UN>) on the model's own phrases, resampled by answer; None without phrases.

    `auc` is None where all phrases are right, or all wrong.
    """
    groups = phrase_verdicts(samples, metric)
    phrases = np.concatenate(groups) if groups else np.zeros((0, 2))
    if not len(phrases):
        return None
    auc = bootstrap_groups(groups, lambda rows: roc_auc(rows[:, 0], rows[:, 1] > 0.5), rounds, seed).to_json()
    p_unconfident, wrong = phrases[:, 0], phrases[:, 1] > 0.5
    # JSON has no NaN: an area that is not defined is null, and so are the ends where no resample had one
    numbers = {name: None if math.isnan(value) else value for name, value in auc.items()}
    return {
        "auc": None if numbers["value"] is None else numbers,
        "phrases": len(phrases),
        "wrong_phrases": int(wrong.sum()),
        "mean_p_unconfident_wrong": float(p_unconfident[wrong].mean()) if wrong.any() else None,
        "mean_p_unconfident_right": float(p_unconfident[~wrong].mean()) if not wrong.all() else None,
    }


def said_before(samples: Sequence[dict]) -> tuple[list[str], list[str]]:
    """Prompts and tagged answers of samples, for a model to read again."""
    return [sample["prompt"] for sample in samples], [sample["tagged_answer"].strip() for sample in samples]


def with_verdicts(samples: Sequence[dict], values: Sequence[Sequence[float]]) -> list[dict]:
    """Samples with other values of P(</UN>), those of each sample's phrases in order."""
    return [
        sample | {"spans": [span | {"p_unconfident": p} for span, p in zip(sample["spans"], ps, strict=True)]}
        for sample, ps in zip(samples, values, strict=True)
    ]


def cost_summary(samples: Sequence[dict]) -> dict[str, float]:
    """What the answers cost: ratios of sums over all samples."""
    n, counts = len(samples), [sample["counts"] for sample in samples]
    forwarded, kept = (sum(c[name] for c in counts) for name in ("tokens_forwarded", "tokens_kept"))
    return {
        "tokens_forwarded_per_kept_token": forwarded / max(1, kept),
        "forwards_per_answer": sum(c["forwards"] for c in counts) / n,
        "image_encodes_per_answer": sum(c["image_encodes"] for c in counts) / n,
        "tokens_per_answer": kept / n,
    }


def verdict_counts(samples: Sequence[dict]) -> dict[str, int]:
    """How many answers were verified phrase by phrase, how many not to the end, and how many had no phrase to verify."""
    counts = Counter(verification(sample["ok"], len(sample["spans"])) for sample in samples)
    names = {VERIFIED: "verified", NOT_VERIFIED: "not_verified", NO_PHRASE: "nothing_to_verify"}
    return {name: counts[verdict] for verdict, name in names.items()}


def score(samples: Sequence[dict], metric: CountMetric, rounds: int = 100, seed: int = 0) -> dict:
    """Metrics with intervals, also by the rows' `category` if they have one, the verifier's ROC area, and the cost."""
    counts = count_matrix(samples, metric)
    summary = {
        "metrics": to_json(metric.intervals(counts, rounds, seed)),
        "cost": cost_summary(samples),
        "verifier": verifier_summary(samples, metric, rounds, seed),
        "n": len(samples),
        "units": len(counts),
        "n_not_ok": sum(not sample["ok"] for sample in samples),
    }
    members: dict[str, list[dict]] = {}
    for sample in samples:
        names = sample["reference"].get("category")
        # a row may belong to several categories
        for name in [] if names is None else names if isinstance(names, list) else [names]:
            members.setdefault(str(name), []).append(sample)
    if members:
        groups = {name: count_matrix(members[name], metric) for name in sorted(members)}
        summary["by_category"] = {
            name: to_json(metric.intervals(rows, rounds, seed)) for name, rows in groups.items()
        }
        apart = sum(map(len, members.values())) == len(samples)  # each question is in one category
        if metric.averages_categories and apart and len(groups) > 1:
            means = mean_of_groups(list(groups.values()), metric.statistics, rounds, seed)
            summary["category_mean"] = to_json(means)
    return summary
