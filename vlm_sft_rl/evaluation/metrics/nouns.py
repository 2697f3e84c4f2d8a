"""Nouns in a text: by a closed vocabulary with synonyms, plurals and nouns of several words, or as the released evaluators
find them, with NLTK and spaCy. Neither of the two is a dependency; their owners publish data files for both apart."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

from ...errors import UserError

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")
_IRREGULAR = (
    "calf calves child children deer deer dice dice die dice elf elves fish fish foot feet goose geese "
    "half halves knife knives leaf leaves life lives loaf loaves man men mouse mice ox oxen person people "
    "scissors scissors sheep sheep shelf shelves thief thieves tooth teeth wife wives wolf wolves woman "
    "women"
)
_PLURALS = dict(zip(_IRREGULAR.split()[::2], _IRREGULAR.split()[1::2], strict=True))
_ES_AFTER_O = {"buffalo", "echo", "hero", "mango", "mosquito", "potato", "tomato", "torpedo", "volcano"}


class Mention(NamedTuple):
    """One occurrence of an object: its canonical noun and its character range in the caption."""

    noun: str
    start: int
    end: int


def plural(noun: str) -> str:
    """English plural of the last word of `noun` (lower case)."""
    head, _, last = noun.rpartition(" ")
    if last in _PLURALS:
        last = _PLURALS[last]
    elif last.endswith("man") and last not in {"human", "talisman", "caiman"}:
        last = last[:-3] + "men"
    elif re.search(r"(s|x|z|ch|sh)$", last) or last in _ES_AFTER_O:
        last += "es"
    elif re.search(r"[^aeiou]y$", last):
        last = last[:-1] + "ies"
    else:
        last += "s"
    return f"{head} {last}" if head else last


def words_of(text: str) -> list[tuple[str, int, int]]:
    """Lower-cased words with their character ranges."""
    return [(match.group().lower(), match.start(), match.end()) for match in _WORD.finditer(text)]


def word_count(caption: str) -> int:
    """Number of words, punctuation not counted."""
    return len(_WORD.findall(caption))


@dataclass(frozen=True)
class Vocabulary:
    """Word sequences and the noun each stands for; `None` marks a phrase that is swallowed without being counted.

    Swallowed phrases keep a part of them from being taken for an object ("home plate" is no plate).
    """

    phrases: Mapping[tuple[str, ...], str | None]

    @classmethod
    def build(
        cls, nouns: Iterable[str] | Mapping[str, Iterable[str] | None], ignore: Iterable[str] = ()
    ) -> "Vocabulary":
        """From canonical nouns, or from a map of canonical noun to its synonyms.

        Plurals are added by rule. A form that is listed wins over a form made by the rule.

        Raises UserError: the vocabulary is empty, or one form would stand for two nouns.
        """
        table = dict(nouns) if isinstance(nouns, Mapping) else dict.fromkeys(nouns, ())
        listed: dict[tuple[str, ...], str | None] = {}
        derived: dict[tuple[str, ...], str | None] = {}

        def add(forms: dict, form: str, noun: str | None) -> None:
            words = _key(form)
            if not words:
                raise UserError(f"vocabulary: {form!r} (for {noun!r}) has no letters. Remove it.")
            if forms.setdefault(words, noun) != noun:
                raise UserError(
                    f"vocabulary: {' '.join(words)!r} stands for both {forms[words]!r} and {noun!r}. "
                    "List it under one of them only."
                )

        for noun, synonyms in table.items():
            if isinstance(synonyms, str):
                raise UserError(
                    f"vocabulary: the synonyms of {noun!r} must be a list, found the text {synonyms!r}."
                )
            for form in (noun, *(synonyms or ())):
                add(listed, form, noun.lower())
        for phrase in ignore:
            add(listed, phrase, None)
        for words, noun in listed.items():
            many = plural(" ".join(words))
            if _key(many) not in listed:
                add(derived, many, noun)
        if not listed:
            raise UserError("vocabulary: no nouns. Give a list of nouns, or a map of noun to synonyms.")
        return cls({**derived, **listed})

    @property
    def nouns(self) -> set[str]:
        return {noun for noun in self.phrases.values() if noun is not None}

    def canonical(self, name: str) -> str | None:
        """The noun that `name` as a whole stands for, or None."""
        return self.phrases.get(_key(name))


def _key(text: str) -> tuple[str, ...]:
    return tuple(word for word, _, _ in words_of(text))


def mentions(caption: str, vocabulary: Vocabulary) -> list[Mention]:
    """Objects mentioned in `caption`, in order, one entry per mention.

    Case is ignored, and at every word the longest listed phrase wins ("hot dog" is not a dog), as in the CHAIR
    evaluation of arXiv 1809.02156 and REVERSE's parser.
    """
    tokens = words_of(caption)
    longest = max(map(len, vocabulary.phrases))
    matches, index = [], 0
    while index < len(tokens):
        for size in range(min(longest, len(tokens) - index), 0, -1):
            words = tuple(token[0] for token in tokens[index : index + size])
            if words in vocabulary.phrases:
                noun = vocabulary.phrases[words]
                if noun is not None:
                    matches.append(Mention(noun, tokens[index][1], tokens[index + size - 1][2]))
                index += size
                break
        else:
            index += 1
    return matches


_NLTK = "pip install nltk, then python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng wordnet"
_SPACY = "pip install spacy, then python -m spacy download"


def _nltk_tools() -> tuple[Callable, Callable]:
    """Text -> tagged tokens, and a word's lemma. Raises UserError: NLTK or its data are missing."""
    try:
        import nltk
    except ImportError as error:
        raise UserError(
            f"rules: released needs NLTK, as the released evaluators do: {_NLTK}. rules: ours needs nothing."
        ) from error

    def tag(text: str) -> list[tuple[str, str]]:
        return nltk.pos_tag(nltk.word_tokenize(text))

    lemmatise = nltk.stem.WordNetLemmatizer().lemmatize
    try:
        tag("A dog sat.")
        lemmatise("dogs")
    except LookupError as error:
        raise UserError(
            f"rules: released: the data files of NLTK are missing ({str(error).strip().splitlines()[0]}): {_NLTK}."
        ) from error
    return tag, lemmatise


def nltk_nouns() -> Callable[[str], list[str]]:
    """Text -> lemmas of its nouns, case kept, as AMBER's evaluator extracts them.

    Raises UserError: NLTK or its data are not installed.
    """
    tag, lemmatise = _nltk_tools()

    @lru_cache(maxsize=4096)
    def nouns(text: str) -> list[str]:
        return [lemmatise(word) for word, kind in tag(text) if kind.startswith("NN")]

    return nouns


def nltk_lemmas(by_kind: bool = True) -> Callable[[str], list[str]]:
    """Text -> lemmas of all its tokens, lower-cased, as the CHAIR evaluator of REVERSE has them, or without `by_kind` that
    of Object HalBench, which takes every token for a noun.

    Raises UserError: NLTK or its data are not installed.
    """
    tag, lemmatise = _nltk_tools()
    kinds = {"J": "a", "V": "v", "N": "n", "R": "r"}

    @lru_cache(maxsize=16384)
    def lemmas(text: str) -> list[str]:
        tagged = tag(text.lower())
        return [lemmatise(word, kinds.get(kind[:1], "n") if by_kind else "n") for word, kind in tagged]

    return lemmas


def _spacy_model(name: str, metric: str) -> Callable:
    """Raises UserError: spaCy or its model is not installed."""
    try:
        import spacy

        return spacy.load(name)
    except (ImportError, OSError) as error:
        raise UserError(
            f"rules: released of {metric} needs spaCy and its model {name}, as the released evaluators do: {_SPACY} {name}. "
            "rules: ours needs nothing."
        ) from error


def spacy_tokens() -> Callable[[str], list[tuple[str, str]]]:
    """Text -> (lemma, tag of the Penn treebank) of its tokens, as Object HalBench's evaluator has them.

    Raises UserError: spaCy or `en_core_web_trf` is not installed.
    """
    language = _spacy_model("en_core_web_trf", "object_halbench")

    @lru_cache(maxsize=16384)
    def tokens(text: str) -> list[tuple[str, str]]:
        return [(token.lemma_, token.tag_) for token in language(text)]

    return tokens


def spacy_similarity(threshold: float) -> Callable[[str, str], bool]:
    """(word, word) -> is their spaCy similarity above `threshold`?

    Raises UserError: spaCy or `en_core_web_lg` is not installed.
    """
    parse = cache(_spacy_model("en_core_web_lg", "amber_generative"))

    @cache
    def similar(word: str, other: str) -> bool:
        return bool(parse(word).similarity(parse(other)) > threshold)

    return similar
