"""A benchmark answered with correction turns: the metric after each turn, and what the turns changed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..data.stages import conclusion
from .bootstrap import Interval, bootstrap
from .metrics.counting import CountMetric
from .scoring import count_matrix, sample_matrix

# What correction turns do to answers: accuracy by turn, flips in both directions, and whether that could be chance.
RIGHT, WRONG, FORMAT = "right", "wrong", "format"
STATUSES = (RIGHT, WRONG, FORMAT)


@dataclass(frozen=True)
class TurnGrades:
    """One question's answer after each turn: `statuses` (right, wrong or format) and `keys` (normal form, or None)."""

    statuses: tuple[str, ...]
    keys: tuple[str | None, ...]

    def at(self, turn: int) -> int:
        """Index of the answer that stands after `turn` turns: the last one, where correction had stopped before."""
        return min(turn, len(self.statuses) - 1)


def mcnemar(wrong_to_right: int, right_to_wrong: int) -> float:
    """Two-sided exact McNemar test: how likely flips this uneven are when both directions are equally likely."""
    n, k = wrong_to_right + right_to_wrong, min(wrong_to_right, right_to_wrong)
    if n == 0:
        return 1.0
    # in logarithms: binomial coefficients of thousands overflow a float
    logs = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2)
        for i in range(k + 1)
    ]
    top = max(logs)
    tail = math.exp(top) * math.fsum(math.exp(value - top) for value in logs)
    return min(1.0, 2 * tail)


def flips(
    before: Sequence[tuple[str, str | None]],
    after: Sequence[tuple[str, str | None]],
    rounds: int = 1000,
    seed: int = 0,
) -> dict:
    """What changed between two answers to the same questions, with 95 % paired bootstrap intervals over questions.

    Args:
        before, after: per question (status, key).

    Returns:
        As shares of all questions `before`, `after`, `net_flips` (after minus before), `wrong_to_right`,
        `right_to_wrong`, `agreement` (same answer), `format_before`, `format_after`; as shares of the right and of the
        wrong ones before `kept_right` and `repaired`; `mcnemar` (p-value), the counts and `n`. A wrong answer and an
        unreadable one are both not right; `format_*` tells them apart.

    Raises:
        ValueError: no questions, or lists of different lengths.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} answers before but {len(after)} after")
    rows = np.array(
        [
            [
                a[0] == RIGHT,
                b[0] == RIGHT,
                a[0] != RIGHT and b[0] == RIGHT,
                a[0] == RIGHT and b[0] != RIGHT,
                a[1] is not None and a[1] == b[1],
                a[0] == FORMAT,
                b[0] == FORMAT,
                1,
            ]
            for a, b in zip(before, after, strict=True)
        ],
        dtype=float,
    ).reshape(len(before), 8)

    def share(column: int):
        return lambda totals: totals[..., column] / totals[..., 7]

    def of(column: int, base):
        def statistic(totals):
            below = base(totals)
            return np.divide(totals[..., column], below, out=np.zeros_like(below), where=below > 0)

        return statistic

    statistics = {
        "before": share(0),
        "after": share(1),
        "net_flips": lambda t: (t[..., 2] - t[..., 3]) / t[..., 7],
        "wrong_to_right": share(2),
        "right_to_wrong": share(3),
        "agreement": share(4),
        "format_before": share(5),
        "format_after": share(6),
        "kept_right": lambda t: 1 - of(3, lambda u: u[..., 0])(t),
        "repaired": of(2, lambda u: u[..., 7] - u[..., 0]),
    }
    found: dict = {
        name: _json_corrections(bootstrap(rows, statistic, rounds, seed))
        for name, statistic in statistics.items()
    }
    up, down = int(rows[:, 2].sum()), int(rows[:, 3].sum())
    return {
        **found,
        "mcnemar": mcnemar(up, down),
        "counts": {"wrong_to_right": up, "right_to_wrong": down},
        "n": len(before),
    }


def by_turn(grades: Sequence[TurnGrades], rounds: int = 1000, seed: int = 0) -> dict:
    """Accuracy after every turn, and the flips of each turn against the first answer.

    Raises:
        ValueError: no questions.
    """
    if not grades:
        raise ValueError("no answers: there is nothing to compare")
    most = max(len(g.statuses) for g in grades)
    first = _answers(grades, 0)
    turns = [
        {
            "turn": turn + 1,
            "reached": sum(len(g.statuses) > turn for g in grades),
            **flips(first, _answers(grades, turn), rounds, seed),
        }
        for turn in range(most)
    ]
    return {"turns": turns, "n": len(grades)}


def by_group(
    grades: Mapping[str, TurnGrades], group: Mapping[str, str], turn: int, rounds: int = 1000, seed: int = 0
) -> dict[str, dict]:
    """Flips between the first answer and that after `turn`, for each group of questions.

    Args:
        grades, group: by question id; questions without a group are left out.
    """
    names = sorted({group[key] for key in grades if key in group}, key=str)
    found = {}
    for name in names:
        chosen = [grades[key] for key in grades if group.get(key) == name]
        found[str(name)] = flips(_answers(chosen, 0), _answers(chosen, turn), rounds, seed)
    return found


def quantile_groups(values: Mapping[str, float], count: int = 4) -> dict[str, str]:
    """Questions by quantile of a number (say, the confidence of the first answer): id -> `1 of 4: 0.12 to 0.57`.

    Equal values share a group, so that a group never depends on the order of questions.
    """
    ordered = np.sort(np.array(list(values.values()), dtype=float))
    if not len(ordered):
        return {}
    edges = [
        ordered[min(len(ordered) - 1, math.ceil(len(ordered) * k / count) - 1)] for k in range(1, count + 1)
    ]
    place = {key: int(np.searchsorted(edges, value, side="left")) for key, value in values.items()}
    inside = {k: [values[key] for key, p in place.items() if p == k] for k in set(place.values())}
    return {
        key: f"{p + 1} of {count}: {min(inside[p]):.3f} to {max(inside[p]):.3f}" for key, p in place.items()
    }


def _answers(grades: Sequence[TurnGrades], turn: int) -> list[tuple[str, str | None]]:
    return [(g.statuses[g.at(turn)], g.keys[g.at(turn)]) for g in grades]


def _json_corrections(interval: Interval) -> dict[str, float]:
    return {name: getattr(interval, name) for name in ("value", "low", "high")}


VERDICTS = {"right": RIGHT, "wrong": WRONG, "unreadable": FORMAT}


def drafts(sample: dict) -> list[dict]:
    """The `turn` events of a sample, in order."""
    return [event for event in sample["trace"] if event.get("kind") == "turn"]


def scored_text(draft: dict) -> str:
    """The conclusion of a draft, or all of it where it has no stages."""
    said = conclusion(draft["text"])
    return draft["text"] if said is None else said


def after_turn(samples: Sequence[dict], turn: int) -> list[dict]:
    """The samples with the answer that stood after `turn` corrections."""
    found = []
    for sample in samples:
        own = drafts(sample)
        found.append({**sample, "answer": scored_text(own[min(turn, len(own) - 1)])})
    return found


def statuses(samples: Sequence[dict], metric: CountMetric) -> list[str] | None:
    """`right`, `wrong` or `format` of each sample's answer; None for metrics that have no such verdict (captions)."""
    verdicts = [VERDICTS.get(metric.verdict(counts)) for counts in sample_matrix(samples, metric)]
    return None if None in verdicts else verdicts


def turn_grades(samples: Sequence[dict], metric: CountMetric) -> dict[str, TurnGrades] | None:
    """Status and normal form of every draft, by question; None for a metric that does not judge whole answers."""
    flat = [{**sample, "answer": scored_text(draft)} for sample in samples for draft in drafts(sample)]
    verdicts = statuses(flat, metric)
    if verdicts is None:
        return None
    found: dict[str, tuple[list, list]] = {}
    for one, status in zip(flat, verdicts, strict=True):
        own = found.setdefault(one["id"], ([], []))
        own[0].append(status)
        own[1].append(None if status == FORMAT else " ".join(one["answer"].casefold().split()).strip(" ."))
    return {identity: TurnGrades(tuple(s), tuple(k)) for identity, (s, k) in found.items()}


def first_confidence(samples: Sequence[dict]) -> dict[str, float]:
    """The probability of the least sure token in each first draft's conclusion."""
    return {sample["id"]: drafts(sample)[0]["least_sure"] for sample in samples}


def turn_summary(samples: Sequence[dict], metric: CountMetric, rounds: int = 100, seed: int = 0) -> dict:
    """Per turn the metric and its paired difference to turn 1; flips where the metric judges whole answers, also by
    `category` and by confidence of the first answer. Empty for metrics whose judge has not seen the drafts."""
    if metric.prediction_field != "answer":
        return {}
    most = max(len(drafts(sample)) for sample in samples)
    counts = [count_matrix(after_turn(samples, turn), metric) for turn in range(most)]
    summary: dict = {
        "turns": [
            {
                "turn": turn + 1,
                "metrics": _json(metric.intervals(own, rounds, seed)),
                "minus_turn_1": _json(metric.differences(own, counts[0], rounds, seed)),
            }
            for turn, own in enumerate(counts)
        ]
    }
    grades = turn_grades(samples, metric)
    if grades is not None:
        summary["flips"] = by_turn(list(grades.values()), rounds, seed)["turns"]
        sure = quantile_groups(first_confidence(samples))
        summary["by_confidence"] = by_group(grades, sure, most - 1, rounds, seed)
        categories = {s["id"]: str(c) for s in samples if (c := s["reference"].get("category")) is not None}
        if categories:
            summary["by_category"] = by_group(grades, categories, most - 1, rounds, seed)
    return summary


def _json(intervals: dict) -> dict[str, dict]:
    return {name: interval.to_json() for name, interval in intervals.items()}
