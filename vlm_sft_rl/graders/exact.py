"""One word or phrase, equal to the gold answer (GQA and sets like it).

`compat` is LLaVA's rule for GQA: the whole output, lower-cased, without a full stop at its end, equals the gold answer.
"""

import re

from .grade import UNREADABLE, Grade, verdict
from .reading import final_answer, words_key

_ARTICLE = re.compile(r"^(?:an?|the)\s+(?=\S)")


def strict(output: str, question: dict) -> Grade:
    text = final_answer(output)
    if text is None:
        return UNREADABLE
    key = _key(text)
    return verdict(text, key, key == _key(question["answer"]))


def _key(text: str) -> str:
    return _ARTICLE.sub("", words_key(text))


def compat(output: str, question: dict) -> Grade:
    text = output.strip().lower().rstrip(".")
    return verdict(text, text, text == question["answer"].lower())
