"""Reward functions for answers with a known right one, in TRL's protocol.

The column they read is `row`: each question's own row as JSON text, so that fields of any type reach the grader.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ..data.stages import problems
from ..errors import UserError
from .regions import Reward, length_reward, text_of


def answer_reward(grade: Callable[[str, dict], Any]) -> Reward:
    """A reward function: 1 where the grade is right, 0 where it is wrong or no answer could be read.

    The share of answers that could not be read is logged as `answers/unreadable`.

    Args:
        grade: `(output, question row) -> Grade`.
    """

    def answer(completions: Sequence, row: Sequence[str], log_metric=None, **columns) -> list[float]:
        pairs = zip(completions, row, strict=True)
        grades = [grade(text_of(completion), json.loads(question)) for completion, question in pairs]
        if log_metric is not None:
            log_metric("answers/unreadable", sum(g.key is None for g in grades) / len(grades))
        return [float(g.correct) for g in grades]

    return answer


def format_reward(completions: Sequence, **columns) -> list[float]:
    """1 where the output is one staged answer without a fault (arXiv 2411.10440's four stages, each once, in order)."""
    return [float(not problems(text_of(completion))) for completion in completions]


def answer_rewards(
    names: Sequence[str], grade: Callable[[str, dict], Any], further: Mapping[str, Reward] | None = None
) -> list[Reward]:
    """The reward functions that a recipe names: `answer`, `format`, `length`, and those of `further`.

    Raises UserError: no such reward, or none at all.
    """
    known = {"answer": answer_reward(grade), "format": format_reward, "length": length_reward}
    known |= further or {}
    check_names(names, known)
    return [known[name] for name in names]


def check_names(names: Sequence[str], known: Collection[str]) -> None:
    """Raises UserError: no such reward, or none at all."""
    if not names or not set(names) <= set(known):
        raise UserError(f"`rewards` is {list(names)!r}. Name at least one of: {', '.join(known)}.")
