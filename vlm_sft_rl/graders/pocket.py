"""The pocket world's problems: `So the answer is X.` There are no released rules, so `compat` equals `strict`."""

import re

from .grade import UNREADABLE, Grade, verdict
from .reading import final_answer, number_key, read_number, words_key

_CONCLUSION = re.compile(r"so the answer is ([\w-]+)", re.IGNORECASE)


def strict(output: str, question: dict) -> Grade:
    concluded = _CONCLUSION.findall(output)
    text = concluded[-1] if concluded else final_answer(output)
    if text is None or len(text.split()) != 1:
        return UNREADABLE
    key, wanted = _key(text), _key(question["answer"])
    return verdict(text, key, key == wanted)


def _key(text: str) -> str:
    number = read_number(text)
    return words_key(text) if number is None else number_key(number)


compat = strict
