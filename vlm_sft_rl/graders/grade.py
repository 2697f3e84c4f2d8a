"""What graders say: the verdict on one answer, a vote over several, and the verdict on a staged answer."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from ..data.conclusions import without_thinking
from ..data.stages import final_block
from ..errors import UserError

RIGHT, WRONG, UNREADABLE = "right", "wrong", "unreadable"
RULES = ("ours", "released")


def check_rules(rules: str, where: str) -> str:
    """By whose rules answers are read and scored: `ours`, or `released`, those of published code with its defects.

    Raises UserError: neither.
    """
    if rules not in RULES:
        raise UserError(f"{where}: rules is {rules!r}, expected one of {', '.join(RULES)}.")
    return rules


@dataclass(frozen=True)
class Grade:
    """What an output answered.

    Attributes:
        answer: the answer as it was written; None when none could be read.
        key: the same for answers that mean the same; what a majority vote counts. None when `answer` is.
        status: `right`, `wrong`, or `unreadable` (no answer could be read, which is not the same as a wrong one).
    """

    answer: str | None
    key: str | None
    status: str

    @property
    def correct(self) -> bool:
        return self.status == RIGHT

    def to_json(self) -> dict:
        return asdict(self)


NO_ANSWER = Grade(None, None, UNREADABLE)
Grader = Callable[[str, dict], Grade]


def verdict(answer: str, key: str, correct: bool) -> Grade:
    return Grade(answer, key, RIGHT if correct else WRONG)


def grade_staged(grader: Grader, output: str, question: dict, *, staged: bool = True) -> Grade:
    """The grade of a staged answer's conclusion; a missing one is a failure of form, not of knowledge.

    Args:
        grader: reads the conclusion of an output by itself, as those of `load_grader` do.
        staged: False also takes an output without stages.
    """
    if staged and final_block(without_thinking(output), "CONCLUSION") is None:
        return NO_ANSWER
    return grader(output, question)


def majority_index(keys: Sequence[str | None], weights: Sequence[float] | None = None) -> int | None:
    """Index of the first answer with the most frequent key; a tie goes to the key that came first.

    Args:
        keys: normal forms of the answers (`Grade.key`); None is an unreadable one, which has no vote.
        weights: of the answers' votes; None: each has one.

    Returns:
        None where no answer is readable.
    """
    votes: dict[str, float] = {}
    for key, weight in zip(keys, [1] * len(keys) if weights is None else weights, strict=True):
        if key is not None:
            votes[key] = votes.get(key, 0) + weight
    # max takes the first of equals, and a map keeps the order in which keys came
    return list(keys).index(max(votes, key=votes.__getitem__)) if votes else None
