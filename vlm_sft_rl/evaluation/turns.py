"""A benchmark answered with correction turns: the metric after each turn, and what the turns changed.

Answers are compared by status and normal form: accuracy by turn, flips in both directions, and whether those could be
chance.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..data.conclusions import conclusion, folded
from ..errors import UserError
from ..graders.grade import RIGHT, UNREADABLE, WRONG, Grader, grade_staged
from .bootstrap import intervals, ratio, statistics_of
from .metrics.counting import CountMetric
from .scoring import count_matrix, sample_matrix, to_json

STATUSES = (RIGHT, WRONG, UNREADABLE)
_FLIPS = statistics_of(
    ("before", "after", "to_right", "to_wrong", "same", "unreadable_before", "unreadable_after", "n"),
    before=lambda t: ratio(t.before, t.n),
    after=lambda t: ratio(t.after, t.n),
    net_flips=lambda t: ratio(t.to_right - t.to_wrong, t.n),
    wrong_to_right=lambda t: ratio(t.to_right, t.n),
    right_to_wrong=lambda t: ratio(t.to_wrong, t.n),
    agreement=lambda t: ratio(t.same, t.n),
    unreadable_before=lambda t: ratio(t.unreadable_before, t.n),
    unreadable_after=lambda t: ratio(t.unreadable_after, t.n),
    kept_right=lambda t: 1 - ratio(t.to_wrong, t.before),
    repaired=lambda t: ratio(t.to_right, t.n - t.before),
)


@dataclass(frozen=True)
class TurnGrades:
    """One question's answer after each turn: `statuses` (right, wrong or unreadable) and `keys` (normal form, or None)."""

    statuses: tuple[str, ...]
    keys: tuple[str | None, ...]

    def at(self, turn: int) -> int:
        """Index of the answer that stands after `turn` turns: the last one, where correction had stopped before."""
        return min(turn, len(self.statuses) - 1)

    def answer(self, turn: int) -> tuple[str, str | None]:
        """Status and key of that answer."""
        return self.statuses[self.at(turn)], self.keys[self.at(turn)]


def grade_turns(grader: Grader, turns: Sequence[dict], question: dict, *, staged: bool = True) -> TurnGrades:
    """The grades of the drafts (`turn` events of an answer's trace)."""
    grades = [grade_staged(grader, turn["text"], question, staged=staged) for turn in turns]
    return TurnGrades(tuple(g.status for g in grades), tuple(g.key for g in grades))


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
        `right_to_wrong`, `agreement` (same answer), `unreadable_before`, `unreadable_after`; as shares of the right and
        of the wrong ones before `kept_right` and `repaired`; `mcnemar` (p-value), the counts and `n`. A wrong answer and
        an unreadable one are both not right; `unreadable_*` tells them apart.

    Raises ValueError: no questions, or lists of different lengths.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} answers before but {len(after)} after")
    rows = []
    for (status_a, key_a), (status_b, key_b) in zip(before, after, strict=True):
        right_a, right_b, same = status_a == RIGHT, status_b == RIGHT, key_a is not None and key_a == key_b
        unreadable = status_a == UNREADABLE, status_b == UNREADABLE
        rows.append(
            [right_a, right_b, not right_a and right_b, right_a and not right_b, same, *unreadable, 1]
        )
    counts = np.array(rows, dtype=float).reshape(len(rows), 8)
    to_right, to_wrong = int(counts[:, 2].sum()), int(counts[:, 3].sum())
    return {
        **{
            name: {"value": interval.value, "low": interval.low, "high": interval.high}
            for name, interval in intervals(counts, _FLIPS, rounds, seed).items()
        },
        "mcnemar": mcnemar(to_right, to_wrong),
        "counts": {"wrong_to_right": to_right, "right_to_wrong": to_wrong},
        "n": len(rows),
    }


def by_turn(grades: Sequence[TurnGrades], rounds: int = 1000, seed: int = 0) -> dict:
    """Accuracy after every turn, and the flips of each turn against the first answer.

    Raises ValueError: no questions.
    """
    if not grades:
        raise ValueError("no answers: there is nothing to compare")
    first = [g.answer(0) for g in grades]
    turns = []
    for turn in range(max(len(g.statuses) for g in grades)):
        reached = sum(len(g.statuses) > turn for g in grades)
        changes = flips(first, [g.answer(turn) for g in grades], rounds, seed)
        turns.append({"turn": turn + 1, "reached": reached, **changes})
    return {"turns": turns, "n": len(grades)}


def by_group(
    grades: Mapping[str, TurnGrades], group: Mapping[str, str], turn: int, rounds: int = 1000, seed: int = 0
) -> dict[str, dict]:
    """Flips between the first answer and that after `turn`, for each group of questions.

    Args:
        grades, group: by question id; questions without a group are left out.
    """
    members: dict[str, list[TurnGrades]] = {}
    for key, grade in grades.items():
        if key in group:
            members.setdefault(group[key], []).append(grade)
    return {
        str(name): flips(
            [g.answer(0) for g in members[name]], [g.answer(turn) for g in members[name]], rounds, seed
        )
        for name in sorted(members, key=str)
    }


def quantile_groups(values: Mapping[str, float], count: int = 4) -> dict[str, str]:
    """Questions by quantile of a number (say, the confidence of the first answer): id -> `1 of 4: 0.12 to 0.57`.

    Equal values share a group, so that a group never depends on the order of questions.
    """
    ordered = np.sort(np.array(list(values.values()), dtype=float))
    n = len(ordered)
    edges = [ordered[min(n - 1, math.ceil(n * k / count) - 1)] for k in range(1, count + 1) if n]
    place = {key: int(np.searchsorted(edges, value, side="left")) for key, value in values.items()}
    inside = {k: [values[key] for key, p in place.items() if p == k] for k in set(place.values())}
    return {
        key: f"{p + 1} of {count}: {min(inside[p]):.3f} to {max(inside[p]):.3f}" for key, p in place.items()
    }


def drafts(sample: dict) -> list[dict]:
    """The `turn` events of a sample, in order. Raises UserError: there is none."""
    turns = [event for event in sample["trace"] if event.get("kind") == "turn"]
    if not turns:
        raise UserError(
            f"sample {sample['id']!r}: no draft in its trace, so it was not decoded with `--decoder correct`. Run the "
            "evaluation again into another folder."
        )
    return turns


def scored_text(draft: dict) -> str:
    """The conclusion of a draft, or all of it where it has none."""
    return conclusion(draft["text"]).text


def after_turn(samples: Sequence[dict], turn: int) -> list[dict]:
    """The samples with the answer that stood after `turn` corrections."""
    return [
        {
            **sample,
            "answer": scored_text(drafts(sample)[: turn + 1][-1]),
        }  # the last one, where correction had stopped
        for sample in samples
    ]


def statuses(samples: Sequence[dict], metric: CountMetric) -> list[str] | None:
    """`right`, `wrong` or `unreadable` of each sample's answer; None for metrics that have no such verdict (captions)."""
    verdicts = [metric.verdict(counts) for counts in sample_matrix(samples, metric)]
    return verdicts if set(verdicts) <= set(STATUSES) else None


def turn_grades(samples: Sequence[dict], metric: CountMetric) -> dict[str, TurnGrades] | None:
    """Status and normal form of every draft, by question; None for a metric that does not judge whole answers."""
    answers = [{**sample, "answer": scored_text(draft)} for sample in samples for draft in drafts(sample)]
    verdicts = statuses(answers, metric)
    if verdicts is None:
        return None
    columns: dict[str, tuple[list, list]] = {}
    for answer, status in zip(answers, verdicts, strict=True):
        key = None if status == UNREADABLE else folded(answer["answer"])
        question_statuses, question_keys = columns.setdefault(answer["id"], ([], []))
        question_statuses.append(status)
        question_keys.append(key)
    return {identity: TurnGrades(tuple(s), tuple(k)) for identity, (s, k) in columns.items()}


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
                "metrics": to_json(metric.intervals(rows, rounds, seed)),
                "minus_turn_1": to_json(metric.differences(rows, counts[0], rounds, seed)),
            }
            for turn, rows in enumerate(counts)
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
