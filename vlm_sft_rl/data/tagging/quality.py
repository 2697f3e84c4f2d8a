"""What a negative must fulfil before anybody learns from it."""

from collections.abc import Collection
from dataclasses import dataclass

from ..tags import VERIFICATION_TOKENS
from .lexicon import content, fix_article, words
from .rules import KINDS, Negative

LONGEST_RATIO = 3.0  # in characters, of the longer to the shorter phrase
PUNCTUATION = ".,;:!?"
BREAKS = "\n\r\t"


@dataclass(frozen=True)
class Facts:
    """What is known: nouns said (or annotated) to be in the image, the answer's other phrases, its words."""

    nouns: Collection[str]
    phrases: Collection[str] = ()
    words: Collection[str] = ()


def fault(negative: Negative, facts: Facts) -> str | None:
    """Why a negative must not be used, in a few words (they are counted), or None when it may be."""
    chunk, wrong = negative.chunk, negative.text
    if not wrong.strip() or wrong != wrong.strip() or any(mark in wrong for mark in BREAKS):
        return "empty or with breaks"
    if any(tag in wrong for tag in VERIFICATION_TOKENS) or "<" in wrong:
        return "tag inside"
    if wrong[-1] in PUNCTUATION:
        return "ends in punctuation"
    short = content(wrong), content(chunk.text)
    if words(wrong) == words(chunk.text) or (short[0] == short[1] and negative.kind != "yes_no"):
        return "same as the positive"
    if set(short[0]) and set(short[0]) < set(short[1]) and negative.kind not in KINDS:
        return "less said, not wrong"
    if any(words(wrong) == words(phrase) for phrase in facts.phrases):
        return "said elsewhere in the answer"
    if negative.head and (negative.head in facts.nouns or (short[0][-1:] and short[0][-1] in facts.words)):
        return "in the image"
    if negative.kind not in KINDS and _names(wrong, chunk.head, facts.nouns):
        return "in the image"
    longer, shorter = max(len(wrong), len(chunk.text)), min(len(wrong), len(chunk.text))
    if longer > LONGEST_RATIO * shorter and longer > 12:
        return "length"
    if wrong != fix_article(wrong) and chunk.text == fix_article(chunk.text):
        return "wrong article"
    if wrong[0].isupper() != chunk.text[0].isupper() and chunk.text[0].isalpha() and wrong[0].isalpha():
        return "capital letter"
    if negative.kind not in KINDS and _first_kind(wrong) != _first_kind(chunk.text):
        return "another article or number"
    return None


def _names(wrong: str, own_head: str, nouns: Collection[str]) -> bool:
    """Whether the last noun of a free phrase is one of the image (its own noun may stay: another attribute)."""
    said = content(wrong)
    tails = {" ".join(said[i:]) for i in range(len(said))}
    return any(tail in nouns and tail != own_head for tail in tails)


def _first_kind(text: str) -> str:
    first = words(text)[:1]
    return {"a": "a", "an": "a", "the": "the"}.get(first[0], "") if first else ""
