"""What the gold answer of a multiple-choice question means: the letter of one of its choices."""

import math
import re
from typing import Any

from ..errors import FORMAT, RowError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LETTER = re.compile(r"[(\[]?([A-Za-z])[)\]]?[.:]?")
_BOOLEANS = ({False: "no", True: "yes"}, {False: "false", True: "true"})


def choice_texts(choices: Any, where: str) -> list[str]:
    """The texts of two choices or more; numbers become text. Raises RowError."""
    texts = [
        str(choice).strip()
        for choice in (choices if isinstance(choices, list) else [])
        if (isinstance(choice, str | int) and not isinstance(choice, bool)) or is_finite(choice)
    ]
    if not (isinstance(choices, list) and 2 <= len(texts) == len(choices) <= len(LETTERS)):
        expected = f"expected a list of 2 to {len(LETTERS)} texts"
        raise RowError(FORMAT, f"field `choices`: {expected}, found {choices!r:.80}.", where)
    return texts


def choice_letter(answer: Any, choices: list[str], where: str) -> str:
    """The letter of the choice that an answer means: its letter in any form (`b`, `(B)`, `B.`), its index from 0, its
    text, or true and false where the choices are yes and no (or true and false).

    Text that is one of the choices means that choice. Raises RowError: the answer means none of them, or two: an index
    where the choices are numbers, a letter where they are letters in another order.
    """
    meanings = _meanings(answer, [text.strip() for text in choices])
    if len(meanings) == 1:
        return meanings.pop()
    known = f"a letter from A to {LETTERS[len(choices) - 1]}, an index from 0 or one of the choices"
    fault = f"may mean {' or '.join(sorted(meanings))}: write the letter" if meanings else f"is not {known}"
    raise RowError(
        FORMAT, f"field `answer`: {answer!r:.80} {fault}. The choices are {choices!r:.200}.", where
    )


def _meanings(answer: Any, texts: list[str]) -> set[str]:
    folded = [text.casefold() for text in texts]
    if isinstance(answer, bool):
        words = next((words for words in _BOOLEANS if sorted(folded) == sorted(words.values())), None)
        return {LETTERS[folded.index(words[answer])]} if words else set()
    is_number = isinstance(answer, int) or is_finite(answer)
    if not is_number and not isinstance(answer, str):
        return set()
    text = str(int(answer) if is_number and answer == int(answer) else answer).strip()
    same = [i for i, choice in enumerate(texts) if choice == text]
    same = same or [i for i, choice in enumerate(folded) if choice == text.casefold()]
    places = set(same)
    if match := _LETTER.fullmatch(text):
        places.add(LETTERS.index(match[1].upper()))
    elif text.isdecimal() and len(text) < 4 and (is_number or not same):
        places.add(int(text))
    return {LETTERS[place] for place in places if place < len(texts)}


def is_finite(value: Any) -> bool:
    """Whether it is a float that is a number."""
    return isinstance(value, float) and math.isfinite(value)
