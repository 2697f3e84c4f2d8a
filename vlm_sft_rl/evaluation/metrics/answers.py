"""Short answers and multiple choice, right or wrong by one of the graders of `vlm_sft_rl.graders`."""

import datasets
import numpy as np

from ...errors import UserError
from ...graders import load_grader
from ..bootstrap import ratio
from .counting import CountMetric

COLUMNS = ("right", "units", "unreadable", "questions")


def accuracy(totals: np.ndarray) -> np.ndarray:
    return ratio(totals[..., 0], totals[..., 1])


def unreadable(totals: np.ndarray) -> np.ndarray:
    return ratio(totals[..., 2], totals[..., 3])


class AnswerAccuracy(CountMetric):
    """`accuracy`, and apart from it `unreadable`: outputs in which no answer could be read. Those are wrong, too.

    `predictions` are whole outputs; `references` are `{"answer", "choices", "unit", "precision", "answer_type",
    "circle"}`, all of them text but `choices`, a list; all but the answer may be None where the grader needs them not.

    Args:
        grader: a name of `vlm_sft_rl.graders.GRADERS`.
        rules: `"ours"`, or `"released"` for the rules of the released evaluators (see the grader's docstring).
        circular: the rows are rotations of multiple-choice questions; one counts as right only where all rotations
            (rows of one `circle`) are (MMBench, arXiv 2307.06281). The unit of the bootstrap is the question then.

    Raises:
        UserError: no such grader or rules, or a reference without what the grader needs.
    """

    columns = COLUMNS
    statistics = {"accuracy": accuracy, "unreadable": unreadable}  # noqa: RUF012
    lower_is_better = frozenset({"unreadable"})
    reads_answers = True
    reference_fields = ("answer",)
    optional_fields = ("choices", "unit", "precision", "answer_type", "circle")
    reference_feature = {  # noqa: RUF012
        "answer": datasets.Value("string"),
        "choices": datasets.Sequence(datasets.Value("string")),
        # `evaluate` refuses None for a string, but not for a large one
        **{name: datasets.Value("large_string") for name in optional_fields[1:]},
    }

    def __init__(self, grader: str, rules: str = "ours", circular: bool = False, **kwargs):
        super().__init__(**kwargs)
        self._grade, self._ours = load_grader(grader, rules), load_grader(grader)
        self.circular = circular

    def check(self, reference) -> None:
        if self.circular and not reference.get("circle"):
            raise UserError("'circle' is missing, which `circular: true` groups rotations by.")
        self._grade("Answer: A", reference)

    def read(self, answer: str, reference) -> str | None:
        # always by our rules: a released one gives the true answer away where it reads none
        return self._ours(answer, reference).key

    def sample_counts(self, prediction: str, reference) -> tuple[int, ...]:
        grade = self._grade(prediction, reference)
        return int(grade.correct), 1, int(grade.status == "unreadable"), 1

    def group_of(self, reference):
        return reference["circle"] if self.circular else None

    def group_counts(self, rows: np.ndarray, references) -> list[float]:
        return [float(rows[:, 0].all()), 1, float(rows[:, 2].sum()), len(rows)]

    def grade(self, phrase: str, reference) -> bool | None:
        grade = self._grade(phrase, reference)
        return None if grade.status == "unreadable" else grade.correct

    def marks(self, answer: str, reference) -> list[tuple[int, int, bool]]:
        """Where the answer that was read stands: its last occurrence, or nowhere if it was rewritten."""
        grade = self._grade(answer, reference)
        at = answer.rfind(grade.answer) if grade.answer else -1
        return [] if at < 0 else [(at, at + len(grade.answer), grade.correct)]

    def badness(self, counts: np.ndarray) -> tuple[float, ...]:
        return (1 - counts[0], counts[2])

    def verdict(self, counts: np.ndarray) -> str:
        return "unreadable" if counts[2] else "right" if counts[0] else "wrong"

    def truth_text(self, reference) -> str:
        answer, choices = reference["answer"], reference.get("choices")
        at = ord(answer) - ord("A") if len(answer) == 1 else -1
        return f"{answer}: {choices[at]}" if choices and 0 <= at < len(choices) else answer
