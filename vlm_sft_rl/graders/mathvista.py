"""MathVista and MMMU: multiple choice, numbers with a stated precision, or words.

Their owners let GPT-4 or a set of patterns find the answer in an output; those extractors are not imitated, so
`compat` equals `strict`. Numbers are compared as MathVista does: rounded to the question's `precision` decimals.
"""

from fractions import Fraction

from . import choice
from .grade import UNREADABLE, Grade, verdict
from .reading import final_answer, number_key, read_number, words_key


def strict(output: str, question: dict) -> Grade:
    if question.get("choices"):
        return choice.strict(output, question)
    text = final_answer(output)
    if text is None:
        return UNREADABLE
    value, wanted = _number(text, question), _number(question["answer"], question)
    if wanted is not None:
        if value is None:
            return verdict(text, words_key(text), False)
        return verdict(text, number_key(value), value == wanted)
    return verdict(text, words_key(text), words_key(text) == words_key(question["answer"]))


def _number(text: str, question: dict) -> Fraction | None:
    """The number, rounded where the question states a precision; a unit of the question may stand behind it."""
    unit = str(question.get("unit") or "").strip()
    if unit and text.rstrip(" .").casefold().endswith(unit.casefold()):
        text = text.rstrip(" .")[: -len(unit)] or text
    value, precision = read_number(text), question.get("precision")
    if value is None or precision in (None, ""):
        return value
    return round(value, int(float(precision)))


compat = strict
