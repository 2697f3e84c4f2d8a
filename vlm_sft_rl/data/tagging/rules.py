"""Wrong alternatives of a phrase, by rule. Pure: a phrase in, candidates out."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .lexicon import ATTRIBUTES, COLOURS, NUMBERS, RELATIONS, YES_NO, fix_article, like, words
from .taggers import Chunk

KINDS = ("yes_no", "choice", "count", "colour", "attribute", "relation", "object")
GENERAL = "general_answer"
Choose = Callable[[Sequence[str]], str]
_OPTION = re.compile(r"(?:^|[\s(])([A-H])[.):]\s", re.MULTILINE)
_NUMBER = re.compile(rf"(?<![\w.-])(\d{{1,4}}|{'|'.join(NUMBERS)})(?![\w-]|[.,]\d)", re.IGNORECASE)
_COLOUR = re.compile(rf"(?<!\w)({'|'.join(COLOURS)})(?!\w)", re.IGNORECASE)
_QUESTIONS = (
    ("count", re.compile(r"\bhow many\b|\bnumber of\b", re.IGNORECASE)),
    ("colour", re.compile(r"\b(what|which) colou?rs?\b", re.IGNORECASE)),
)


@dataclass(frozen=True)
class Negative:
    """A phrase that is wrong where `chunk` stands, and the kind of mistake; its noun or place, where that is new."""

    chunk: Chunk
    text: str
    kind: str
    head: str = ""
    place: str = ""


def answer_type(question: str, answer: str) -> str:
    """ "yes_no", "choice", "count", "colour" or "general_answer" (REVERSE's name for all that is free text)."""
    if YES_NO.match(answer):
        return "yes_no"
    if re.fullmatch(r"\s*\(?[A-H]\)?[.:]?\s*", answer) and options(question):
        return "choice"
    for kind, pattern in _QUESTIONS:
        if pattern.search(question):
            return kind
    return GENERAL


def options(question: str) -> list[str]:
    """Letters of the options of a multiple-choice question; empty unless they run A, B, …"""
    letters = _OPTION.findall(question)
    expected = [chr(ord("A") + i) for i in range(len(letters))]
    return letters if len(letters) > 1 and letters == expected else []


def by_rule(chunk: Chunk, question: str, kind_of_answer: str, choose: Choose) -> Iterator[Negative]:
    """Candidates of every kind but "object".

    Args:
        choose: picks one of several words, by chance; how often they occur in the data set should count.
    """
    if kind_of_answer == "yes_no":
        if YES_NO.fullmatch(chunk.text):
            flipped = "No" if chunk.text.lower() == "yes" else "Yes"
            yield Negative(chunk, flipped if chunk.text[0].isupper() else flipped.lower(), "yes_no")
        return
    if kind_of_answer == "choice":
        others = [letter for letter in options(question) if letter not in chunk.text]
        if others and (letter := re.search(r"[A-H]", chunk.text)):
            wrong = chunk.text[: letter.start()] + choose(others) + chunk.text[letter.end() :]
            yield Negative(chunk, wrong, "choice")
        return
    for found in _NUMBER.finditer(chunk.text):
        if (other := other_number(found.group(), chunk, choose)) is not None:
            yield _swap(chunk, found, other, "count")
    colours = {word for word in words(chunk.text) if word in COLOURS}
    for found in _COLOUR.finditer(chunk.text):
        if chunk.noun and chunk.text[found.start() :].lower() == chunk.noun.lower():
            continue  # "an orange" is a fruit
        others = [
            c for c in COLOURS[:10] if c not in colours and not {c, found.group().lower()} <= {"gray", "grey"}
        ]
        yield _swap(chunk, found, choose(others), "colour")
    for group in ATTRIBUTES:
        for found in re.finditer(rf"(?<![\w-])({'|'.join(group)})(?![\w-])", chunk.text, re.IGNORECASE):
            others = [word for word in group if word not in words(chunk.text)]
            if others and len(chunk.place) <= found.start() and found.end() < len(chunk.text):
                yield _swap(chunk, found, choose(others), "attribute")
    if chunk.place:
        for other in sorted(
            {o for group in RELATIONS if chunk.place in group for o in group} - {chunk.place}
        ):
            wrong = like(other, chunk.text[: len(chunk.place)]) + chunk.text[len(chunk.place) :]
            yield Negative(chunk, wrong, "relation", place=other)


def swap_noun(chunk: Chunk, noun: str, head: str) -> Negative:
    """The phrase with another noun, of the same number, in the place of its own."""
    start = len(chunk.text) - len(chunk.noun)
    text = fix_article(chunk.text[:start] + like(noun, chunk.noun))
    return Negative(chunk, text, "object", head)


def other_number(number: str, chunk: Chunk, choose: Choose) -> str | None:
    """A number near by, in words or digits as the given one; one stays one's number of the noun (one, or more)."""
    word = number.lower()
    value = NUMBERS.index(word) if word in NUMBERS else int(number)
    if value == 1 and chunk.noun:
        return None  # "one dog": another number would need another form of the noun
    low = 2 if chunk.noun else 0
    near = [n for n in range(value - 3, value + 4) if n >= low and n != value]
    if word in NUMBERS:
        near = [n for n in near if n < len(NUMBERS)]
        return like(choose([NUMBERS[n] for n in near]), number)
    return choose([str(n) for n in near])


def _swap(chunk: Chunk, found: re.Match, other: str, kind: str) -> Negative:
    text = chunk.text[: found.start()] + like(other, found.group()) + chunk.text[found.end() :]
    return Negative(chunk, fix_article(text), kind)
