"""Graders: an output and its question -> what was answered, and whether that is right. No `eval()`, no chance.

`ours` (the default) reads one clearly marked answer and compares values. `released` follows the rules of the released
MM-Self-Improve code (arXiv 2411.00855), defects included, so that figures can be held against published ones.
"""

from ..errors import UserError
from . import choice, numbers, text
from .grade import RIGHT, RULES, UNREADABLE, WRONG, Grade, Grader, check_rules, verdict

__all__ = ["GRADERS", "RIGHT", "RULES", "UNREADABLE", "WRONG", "Grade", "Grader", "load_grader"]

# data set -> the grader by our rules, and by the released ones
GRADERS: dict[str, tuple[Grader, Grader]] = {
    "chartqa": (numbers.chartqa, numbers.chartqa_released),
    "choice": (choice.choice, choice.choice_released),
    "clevr_math": (numbers.clevr_math, numbers.clevr_math_released),
    "exact": (text.exact, text.exact_released),
    "geoqa": (choice.choice, choice.choice_released),
    "mathvista": (numbers.mathvista, numbers.mathvista),
    "pocket": (text.pocket, text.pocket),
    "tabmwp": (numbers.tabmwp, numbers.tabmwp_released),
}


def load_grader(name: str, rules: str = "ours") -> Grader:
    """The grader of a data set: `(output, question row) -> Grade`.

    Raises:
        UserError: no such grader or rules. Calling it raises UserError for a question whose fields it cannot use.
    """
    if name not in GRADERS:
        raise UserError(f"There is no grader {name!r}. Graders: {', '.join(GRADERS)}.")
    grader = GRADERS[name][RULES.index(check_rules(rules, f"grader {name!r}"))]

    def checked(output: str, question: dict) -> Grade:
        answer = question.get("answer")
        if not isinstance(answer, str) or not answer.strip():
            raise UserError(
                f"question {question.get('id')!r}: `answer` must be text that is not empty, found {answer!r}."
            )
        grade = grader(output, question)
        if rules == "ours" and grade.status == UNREADABLE:
            key = text.words_key(output)
            if key == text.words_key(answer):  # a bare answer of many words
                return verdict(output.strip(), key, True)
        return grade

    return checked
