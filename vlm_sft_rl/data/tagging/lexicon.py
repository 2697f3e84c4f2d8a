"""Closed word lists of the rules, and words compared without case, articles and spacing."""

import re

_COLOURS = "red orange yellow green blue purple pink brown black white gray grey gold silver tan beige maroon turquoise"
COLOURS = tuple(_COLOURS.split())
_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
NUMBERS = tuple(_NUMBERS.split())
# words of a group exclude one another
ATTRIBUTES = tuple(
    tuple(group.split())
    for group in (
        "small large",
        "little big",
        "tiny huge",
        "short tall",
        "short long",
        "narrow wide",
        "old new",
        "old young",
        "open closed",
        "empty full",
        "wet dry",
        "clean dirty",
        "bright dark",
        "hot cold",
        "thin thick",
        "round square rectangular triangular",
        "wooden metal plastic glass stone leather concrete",
        "striped checkered plain spotted",
        "smiling frowning",
        "standing sitting lying",
        "male female",
        "front back",
        "left right",
        "top bottom",
        "upper lower",
        "first second third",
        "sunny cloudy rainy snowy",
    )
)
RELATIONS = tuple(
    tuple(group.split("|"))
    for group in (
        "to the left of|to the right of",
        "on the left side of|on the right side of",
        "in front of|behind",
        "on top of|under",
        "on|under",
        "over|under",
        "above|below",
        "inside|outside",
        "in|behind",
        "near|far from",
        "next to|far from",
        "beside|far from",
    )
)
# prepositions that tell a place; a phrase takes the one before it along, so that the place can be wrong too
PLACES = tuple(
    sorted(
        {text for group in RELATIONS for text in group}
        | {
            "at",
            "between",
            "among",
            "around",
            "by",
            "beneath",
            "against",
            "across",
            "along",
            "underneath",
            "beyond",
        },
        key=len,
        reverse=True,
    )
)
ARTICLES = ("a", "an", "the", "this", "that", "these", "those", "some", "any")
YES_NO = re.compile(r"\s*(yes|no)\b", re.IGNORECASE)
# phrases that say nothing about what is shown
_UNINFORMATIVE = (
    "image picture photo photograph scene view background foreground middle center centre side top bottom front back "
    "left right way thing something anything nothing everything addition fact case example order part kind type sort lot "
    "one ones other others question answer conclusion overall total"
)
UNINFORMATIVE = frozenset(_UNINFORMATIVE.split())
_PRONOUNS = (
    "i you he she it we they me him her us them this that these those who whom which what there someone somebody everyone "
    "everybody anyone each both all none its his their our your my"
)
PRONOUNS = frozenset(_PRONOUNS.split())
_WORD = re.compile(r"[\w'’-]+")


def words(text: str) -> list[str]:
    """Lower-case words."""
    return [word.lower() for word in _WORD.findall(text)]


def content(text: str) -> tuple[str, ...]:
    """The words that carry the meaning: without articles and pronouns."""
    return tuple(word for word in words(text) if word not in ARTICLES and word not in PRONOUNS)


def fix_article(text: str) -> str:
    """`a orange` -> `an orange`, at the start and after a preposition; nothing else is touched."""

    def fixed(found: re.Match) -> str:
        article = "an" if vowel_sound(found.group(3)) else "a"
        return (
            (article.capitalize() if found.group(1)[0].isupper() else article)
            + found.group(2)
            + found.group(3)
        )

    return re.sub(r"\b(an?|An?)(\s+)([\w'’-]+)", fixed, text)


def vowel_sound(word: str) -> bool:
    """Whether `an` goes before the word, by spelling and the commonest exceptions."""
    word = word.lower()
    if re.match(r"(uni(?!n|m)|use|usu|eu|one\b|once|ut(?!t)|uk)", word):
        return False
    return (
        word[:1] in "aeiou" or word.startswith(("hour", "honest", "heir", "honor", "honour")) or word == "8"
    )


def like(text: str, model: str) -> str:
    """`text` with the capital letters of `model`: all, the first, or none."""
    if model.isupper() and len(model) > 1:
        return text.upper()
    return text[:1].upper() + text[1:] if model[:1].isupper() else text
