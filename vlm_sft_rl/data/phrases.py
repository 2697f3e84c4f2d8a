"""Finding the noun phrases of a caption over a given vocabulary, and putting another noun into one."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

NUMBERS = (
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "some",
    "several",
    "many",
)
ADJECTIVES = (
    *(
        "red",
        "orange",
        "yellow",
        "green",
        "blue",
        "purple",
        "violet",
        "pink",
        "brown",
        "black",
        "white",
        "grey",
    ),
    *(
        "gray",
        "golden",
        "silver",
        "dark",
        "light",
        "bright",
        "small",
        "little",
        "tiny",
        "large",
        "big",
        "huge",
    ),
    *(
        "tall",
        "short",
        "long",
        "old",
        "young",
        "new",
        "wooden",
        "metal",
        "plastic",
        "round",
        "square",
        "striped",
    ),
)

_PAIRS = "man men woman women child children person people foot feet tooth teeth goose geese mouse mice knife knives"
_PAIRS += " leaf leaves shelf shelves loaf loaves wolf wolves fish fish sheep sheep deer deer aircraft aircraft"
IRREGULAR = dict(zip(_PAIRS.split()[::2], _PAIRS.split()[1::2], strict=True))


@dataclass(frozen=True)
class Phrase:
    """Characters `[start, end)` of a caption and the noun of the vocabulary that they name."""

    start: int
    end: int
    text: str
    noun: str


def find_phrases(text: str, nouns: Collection[str], adjectives: Collection[str] = ADJECTIVES) -> list[Phrase]:
    """Phrases `a|an|the|number? adjective* noun`, left to right, not overlapping.

    Nouns may be of several words ("traffic light"); the longest match wins; plurals in -s, -es, -ies count as their
    noun. Case does not matter.
    """
    pattern, singular = _pattern(tuple(sorted(nouns)), tuple(sorted(adjectives)))
    return [
        Phrase(m.start(), m.end(), m.group(), singular[m.group("noun").lower()])
        for m in pattern.finditer(text)
    ]


def replace_noun(phrase: str, old: str, new: str) -> str:
    """`a red umbrella` -> `a red star`: number and article are kept in agreement, a capital letter is kept."""
    written = next((n for n in (plural(old), old) if phrase.lower().endswith(n.lower())), None)
    if written is None:
        raise ValueError(f"{phrase!r} does not end with {old!r}")
    first = phrase.split()[0].lower()
    counted = first in NUMBERS[1:] or (first.isdigit() and first != "1")
    is_plural = counted or (written == plural(old) and written != old)
    swapped = phrase[: len(phrase) - len(written)] + (plural(new) if is_plural else new)
    if found := re.match(r"(an?)(\s+)(\w)", swapped, re.IGNORECASE):
        article = "an" if found.group(3).lower() in "aeiou" else "a"
        swapped = article + swapped[found.end(1) :]
    return swapped[0].upper() + swapped[1:] if phrase[0].isupper() else swapped


def plural(noun: str) -> str:
    """English plural by rule, with the commonest exceptions."""
    stem, space, last = noun.rpartition(" ")
    if last.lower() in IRREGULAR:
        return stem + space + IRREGULAR[last.lower()]
    if re.search(r"(ss|us|x|z|ch|sh)$", noun):
        return noun + "es"
    if noun.endswith("s"):
        return noun
    return noun[:-1] + "ies" if re.search(r"[^aeiou]y$", noun) else noun + "s"


@lru_cache(maxsize=8)
def _pattern(nouns: tuple[str, ...], adjectives: tuple[str, ...]) -> tuple[re.Pattern, dict[str, str]]:
    singular = {plural(noun).lower(): noun for noun in nouns} | {noun.lower(): noun for noun in nouns}
    heads = "|".join(re.escape(n) for n in sorted(singular, key=len, reverse=True)) or r"(?!)"
    kinds = "|".join(map(re.escape, adjectives)) or r"(?!)"
    starts = "|".join(("an", "a", "the", *NUMBERS, r"\d+"))
    pattern = rf"(?<!\w)(?:(?:{starts})\s+)?(?:(?:{kinds})\s+)*(?P<noun>{heads})(?!\w)"
    return re.compile(pattern, re.IGNORECASE), singular
