"""CLEVR-Math: whole numbers.

`compat` is the released rule: the whole output is a number from 0 to 10, or the first `Answer:` with an integer behind
it; the text is compared, so `03` is not `3`.
"""

import re

from ..errors import UserError
from .grade import UNREADABLE, Grade, verdict
from .reading import final_answer, read_number

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_RELEASED = re.compile(r"Answer:\s*(-?\d+)")


def _integer(text: str) -> int | None:
    first = text.split()[0].strip(".,").lower() if text.split() else ""
    if first in _WORDS:
        return _WORDS.index(first)
    value = read_number(text)
    if value is None:  # "3 spheres"
        value = read_number(first)
    return int(value) if value is not None and value.denominator == 1 else None


def strict(output: str, question: dict) -> Grade:
    gold = question["answer"]
    if (wanted := _integer(gold)) is None:
        raise UserError(f"question {question.get('id')!r}: the answer {gold!r} is no whole number.")
    text = final_answer(output)
    number = _integer(text) if text is not None else None
    if number is None:
        return UNREADABLE
    return verdict(text, str(number), number == wanted)


def compat(output: str, question: dict) -> Grade:
    whole = output.strip()
    if re.fullmatch(r"\d|10", whole):
        found = whole
    elif match := _RELEASED.search(output):
        found = match[1]
    else:
        return UNREADABLE
    return verdict(found, found, found == question["answer"].strip())
