"""When to stop correcting: always K turns, when the answer repeats itself, or when an oracle says it is right."""

from collections.abc import Sequence

from ..evaluation.turns import RIGHT, TurnGrades


def always(grade: TurnGrades, turns: int) -> int:
    """The turn whose answer stands after `turns` corrections."""
    return grade.at(turns)


def self_stopped(grade: TurnGrades, turns: int) -> int:
    """Stops after the first correction that repeats the answer before it."""
    last = grade.at(turns)
    for turn in range(1, last + 1):
        if grade.keys[turn] is not None and grade.keys[turn] == grade.keys[turn - 1]:
            return turn
    return last


def oracle(grade: TurnGrades, turns: int) -> int:
    """Stops at the first right answer: the most that any stopping rule could reach."""
    last = grade.at(turns)
    return next((turn for turn in range(last + 1) if grade.statuses[turn] == RIGHT), last)


RULES = {"always": always, "self-stopped": self_stopped, "oracle": oracle}


def stopping_table(grades: Sequence[TurnGrades], most: int) -> list[dict]:
    """Accuracy and mean number of corrections for K = 0 … `most` under each rule."""
    n = max(1, len(grades))
    rows = []
    for turns in range(most + 1):
        for name, rule in RULES.items():
            stopped = [rule(grade, turns) for grade in grades]
            right = sum(g.statuses[t] == RIGHT for g, t in zip(grades, stopped, strict=True))
            rows.append(
                {"turns": turns, "rule": name, "accuracy": right / n, "corrections": sum(stopped) / n}
            )
    return rows
