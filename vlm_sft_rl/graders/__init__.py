"""Graders: an output and its question -> what was answered, and whether that is right. No `eval()`, no chance.

`strict` (the default) reads one clearly marked answer and compares values. `compat` follows the rules of the released
MM-Self-Improve code (arXiv 2411.00855), defects included, so that figures can be held against published ones.
"""

from collections.abc import Callable
from importlib import import_module

from ..errors import UserError
from .grade import FORMAT, RIGHT, WRONG, Grade, verdict
from .reading import words_key

MODES = ("strict", "compat")
GRADERS = ("chartqa", "choice", "clevr_math", "exact", "geoqa", "mathvista", "pocket", "tabmwp")
_HOME = {"geoqa": "choice"}
__all__ = ["FORMAT", "GRADERS", "MODES", "RIGHT", "WRONG", "Grade", "Grader", "load_grader"]

Grader = Callable[[str, dict], Grade]


def load_grader(name: str, mode: str = "strict") -> Grader:
    """The grader of a data set: `(output, question row) -> Grade`.

    Raises:
        UserError: no such grader or mode. Calling it raises UserError for a question whose fields it cannot use.
    """
    if name not in GRADERS:
        raise UserError(f"There is no grader {name!r}. Graders: {', '.join(GRADERS)}.")
    if mode not in MODES:
        raise UserError(f"`grader_mode` is {mode!r}. Modes: {', '.join(MODES)}.")
    grade = getattr(import_module(f"{__name__}.{_HOME.get(name, name)}"), mode)

    def checked(output: str, question: dict) -> Grade:
        answer = question.get("answer")
        if not isinstance(answer, str) or not answer.strip():
            raise UserError(
                f"question {question.get('id')!r}: `answer` must be text that is not empty, found {answer!r}."
            )
        found = grade(output, question)
        if mode == "strict" and found.status == FORMAT and words_key(output) == words_key(answer):
            return verdict(output.strip(), words_key(output), True)  # a bare answer of many words
        return found

    return checked
