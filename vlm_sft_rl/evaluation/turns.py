"""A benchmark answered with correction turns: the metric after each turn, and what the turns changed."""

from collections.abc import Sequence

from ..data.stages import conclusion
from .corrections import FORMAT, RIGHT, WRONG, TurnGrades, by_group, by_turn, quantile_groups
from .metrics.counting import CountMetric
from .scoring import count_matrix, sample_matrix

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
