"""ChartQA: numbers within five per cent of the gold answer, texts equal.

`compat` is the released rule: everything behind the first `Answer:`, without cleaning, so `5%` is no number there.
"""

import re

from .grade import UNREADABLE, Grade, verdict
from .reading import final_answer, number_key, read_number, words_key

TOLERANCE = 0.05


def _items(text: str) -> list[str]:
    """The parts of a list answer such as `[2012, 2014]`; one part otherwise."""
    inner = text.strip()
    if inner.startswith("[") and inner.endswith("]"):
        return [words_key(part) for part in inner[1:-1].split(",")]
    return [words_key(inner)]


def strict(output: str, question: dict) -> Grade:
    text, gold = final_answer(output), question["answer"]
    if text is None:
        return UNREADABLE
    value, wanted = read_number(text), read_number(gold)
    if wanted is not None:
        if value is None:
            return verdict(text, words_key(text), False)
        return verdict(text, number_key(value), abs(value - wanted) <= TOLERANCE * abs(wanted))
    key = ", ".join(_items(text))
    return verdict(text, key, _items(text) == _items(gold))


def compat(output: str, question: dict) -> Grade:
    found = re.search(r"Answer:(.*)", output, re.DOTALL)
    text = (found[1] if found else output).strip()
    gold = question["answer"]
    try:
        value, wanted = float(text), float(gold)
    except ValueError:
        return verdict(text, text, text.lower() == gold.strip().lower())
    return verdict(text, text, abs(value - wanted) <= TOLERANCE * abs(wanted))
