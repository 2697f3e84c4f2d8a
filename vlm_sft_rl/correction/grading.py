"""Grading staged answers: the conclusion alone is read, and a missing one is a failure of form, not of knowledge."""

from collections.abc import Sequence

from ..data.stages import conclusion
from ..evaluation.turns import TurnGrades
from ..graders import Grader
from ..graders.grade import UNREADABLE, Grade


def grade_staged(grader: Grader, output: str, question: dict, *, staged: bool = True) -> Grade:
    """The grade of an output's conclusion.

    Args:
        staged: False also takes an output without stages, and grades it whole.
    """
    said = conclusion(output)
    if said is not None:
        # graders look for a marked answer; the stage has marked it
        return grader(f"Answer: {' '.join(said.split())}", question)
    return UNREADABLE if staged else grader(output, question)


def grade_turns(grader: Grader, turns: Sequence[dict], question: dict, *, staged: bool = True) -> TurnGrades:
    """The grades of the drafts (`turn` events of an answer's trace)."""
    grades = [grade_staged(grader, turn["text"], question, staged=staged) for turn in turns]
    return TurnGrades(tuple(g.status for g in grades), tuple(g.key for g in grades))
