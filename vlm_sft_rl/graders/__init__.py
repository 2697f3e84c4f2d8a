"""Graders: an output and its question -> what was answered, and whether that is right. No `eval()`, no chance.

What is graded is the conclusion of an output (`data.conclusions`). `ours` (the default) reads one clearly marked answer in
it and compares values. `released` follows the rules of the released MM-Self-Improve code (arXiv 2411.00855), defects
included, so that figures can be held against published ones; those programs know no thinking and no wrappers.
"""

from ..data.conclusions import conclusion
from ..errors import UserError
from . import choice, numbers, text
from .grade import RIGHT, RULES, UNREADABLE, WRONG, Grade, Grader, check_rules, verdict

__all__ = ["GRADERS", "RIGHT", "RULES", "UNREADABLE", "WRONG", "Grade", "Grader", "load_grader"]

LONGEST_OUTPUT = 200_000  # characters; of a longer output the end is read
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


# what the released program that builds the training rows does otherwise than the one that evaluates
BUILDING = {"geoqa": choice.choice_building}


def load_grader(name: str, rules: str = "ours", *, building: bool = False) -> Grader:
    """The grader of a data set: `(output, question row) -> Grade`.

    Args:
        building: for samples that training rows are built of. It matters to `released` GeoQA alone, whose rows were built by
            another program than the one that evaluates.

    Raises UserError: no such grader or rules. Calling it raises UserError for a question whose fields it cannot use.
    """
    if name not in GRADERS:
        raise UserError(f"There is no grader {name!r}. Graders: {', '.join(GRADERS)}.")
    grader = GRADERS[name][RULES.index(check_rules(rules, f"grader {name!r}"))]
    if building and rules == "released":
        grader = BUILDING.get(name, grader)

    def checked(output: str, question: dict) -> Grade:
        answer = question.get("answer")
        if not isinstance(answer, str) or not answer.strip():
            raise UserError(
                f"question {question.get('id')!r}: `answer` must be text that is not empty, found {answer!r}."
            )
        if text.ran_away(answer):  # it could not be told from an output that ran away
            raise UserError(
                f"question {question.get('id')!r}: `answer` is a number of more than {text.LONGEST_NUMBER} characters."
            )
        output = output[-LONGEST_OUTPUT:]
        concluded = conclusion(output).text
        grade = grader(output if rules == "ours" else concluded, question)
        if rules == "ours" and grade.status == UNREADABLE:
            key = text.words_key(concluded)
            if key == text.words_key(answer):  # a bare answer of many words
                return verdict(concluded.strip(), key, True)
        return grade

    return checked
