"""The text tools of the released evaluators (NLTK, spaCy), for `rules: released`; neither is a dependency.

Both come with data files of their own, which their owners publish apart from the packages.
"""

from collections.abc import Callable
from functools import cache, lru_cache

from ...errors import UserError

_NLTK = "pip install nltk, then python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng wordnet"
_SPACY = "pip install spacy, then python -m spacy download en_core_web_lg"


def _nltk():
    """NLTK with its data loaded. Raises UserError: either is missing."""
    try:
        import nltk
    except ImportError as error:
        raise UserError(
            f"rules: released needs NLTK, as the released evaluators do: {_NLTK}. rules: ours needs nothing."
        ) from error
    try:
        nltk.pos_tag(nltk.word_tokenize("A dog sat."))
        nltk.stem.WordNetLemmatizer().lemmatize("dogs")
    except LookupError as error:
        raise UserError(
            f"rules: released: the data files of NLTK are missing ({str(error).strip().splitlines()[0]}): {_NLTK}."
        ) from error
    return nltk


def nltk_nouns() -> Callable[[str], list[str]]:
    """Text -> lemmas of its nouns, case kept, as AMBER's evaluator extracts them.

    Raises:
        UserError: NLTK or its data are not installed.
    """
    nltk = _nltk()
    lemmatise = nltk.stem.WordNetLemmatizer().lemmatize

    @lru_cache(maxsize=4096)
    def nouns(text: str) -> list[str]:
        tagged = nltk.pos_tag(nltk.word_tokenize(text))
        return [lemmatise(word) for word, tag in tagged if tag.startswith("NN")]

    return nouns


def nltk_lemmas() -> Callable[[str], list[str]]:
    """Text -> lemmas of all its tokens, lower-cased, as the CHAIR evaluator of REVERSE has them.

    Raises:
        UserError: NLTK or its data are not installed.
    """
    nltk = _nltk()
    lemmatise = nltk.stem.WordNetLemmatizer().lemmatize
    kinds = {"J": "a", "V": "v", "N": "n", "R": "r"}

    @lru_cache(maxsize=16384)
    def lemmas(text: str) -> list[str]:
        tagged = nltk.pos_tag(nltk.word_tokenize(text.lower()))
        return [lemmatise(word, kinds.get(tag[:1], "n")) for word, tag in tagged]

    return lemmas


def spacy_similarity(threshold: float) -> Callable[[str, str], bool]:
    """(word, word) -> is their spaCy similarity above `threshold`?

    Raises:
        UserError: spaCy or `en_core_web_lg` is not installed.
    """
    try:
        import spacy

        language = spacy.load("en_core_web_lg")
    except (ImportError, OSError) as error:
        raise UserError(
            "rules: released of amber_generative needs spaCy and its model en_core_web_lg, as the released evaluators "
            f"do: {_SPACY}. rules: ours needs nothing."
        ) from error

    @cache
    def read(word: str):
        return language(word)

    @cache
    def similar(one: str, other: str) -> bool:
        return bool(read(one).similarity(read(other)) > threshold)

    return similar
