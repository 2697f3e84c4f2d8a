"""CHAIR: which share of the objects a caption mentions is not in the picture (arXiv 1809.02156)."""

from collections.abc import Iterable, Mapping, Sequence

import datasets
import numpy as np

from ...errors import UserError
from ..bootstrap import ratio
from .counting import CountMetric
from .vocabulary import Vocabulary, mentions, word_count

COLUMNS = ("hallucinated", "mentioned", "any_hallucinated", "covered", "present", "words", "captions")


def chair_counts(caption: str, objects: Iterable[str], vocabulary: Vocabulary) -> tuple[int, ...]:
    """Counts of one caption, in the order of `COLUMNS`.

    Hallucinated and mentioned objects are counted per mention (a repeated one counts again), covered and present ones
    once each, as the REVERSE evaluation does.

    Raises:
        UserError: an object of the picture is not in the vocabulary, so that a caption naming it would go unseen.
    """
    truth = set()
    for name in objects:
        noun = vocabulary.canonical(name)
        if noun is None:
            raise UserError(
                f"object {name!r} is not in the vocabulary. Add it to the spec's vocabulary, or as a synonym."
            )
        truth.add(noun)
    named = [mention.noun for mention in mentions(caption, vocabulary)]
    wrong = sum(noun not in truth for noun in named)
    return (
        wrong,
        len(named),
        int(wrong > 0),
        len(truth.intersection(named)),
        len(truth),
        word_count(caption),
        1,
    )


def chair_i(totals: np.ndarray) -> np.ndarray:
    return ratio(totals[..., 0], totals[..., 1])


def chair_s(totals: np.ndarray) -> np.ndarray:
    return ratio(totals[..., 2], totals[..., 6])


def coverage(totals: np.ndarray) -> np.ndarray:
    return ratio(totals[..., 3], totals[..., 4])


def length(totals: np.ndarray) -> np.ndarray:
    return ratio(totals[..., 5], totals[..., 6])


class Chair(CountMetric):
    """CHAIR (arXiv 1809.02156, section 2.1): object hallucination in captions.

    `predictions` are captions, `references` lists of the nouns in each picture. Reported, all but the last as
    fractions: `chair_i` (hallucinated / all mentions), `chair_s` (captions with a hallucinated mention),
    `coverage` (objects of the picture that are mentioned; "recall" in the original), `length` (words).

    A caption that mentions nothing has no hallucination; its price shows in `coverage`.

    Args:
        vocabulary: nouns, or a map of noun to synonyms, or a ready `Vocabulary`.
        ignore: phrases that are read over ("home plate").

    Raises:
        UserError: an object of a reference is not in the vocabulary.
    """

    columns = COLUMNS
    statistics = {"chair_i": chair_i, "chair_s": chair_s, "coverage": coverage, "length": length}  # noqa: RUF012
    lower_is_better = frozenset({"chair_i", "chair_s"})
    not_fractions = frozenset({"length"})
    reference_fields = ("objects",)
    reference_feature = datasets.Sequence(datasets.Value("string"))

    def __init__(
        self,
        vocabulary: Vocabulary | Sequence[str] | Mapping[str, Sequence[str]],
        ignore: Sequence[str] = (),
        **kwargs,
    ):
        super().__init__(**kwargs)
        if not isinstance(vocabulary, Vocabulary):
            vocabulary = Vocabulary.build(vocabulary, ignore)
        self.vocabulary = vocabulary

    def sample_counts(self, prediction: str, reference: Sequence[str]) -> tuple[int, ...]:
        if isinstance(reference, str) or not all(isinstance(noun, str) for noun in reference):
            raise UserError(f"expected a list of nouns, found {reference!r}.")
        return chair_counts(prediction, reference, self.vocabulary)

    def grade(self, phrase: str, reference: Sequence[str]) -> bool | None:
        named = {mention.noun for mention in mentions(phrase, self.vocabulary)}
        if not named:
            return None
        return named <= {self.vocabulary.canonical(noun) for noun in reference}

    def marks(self, answer: str, reference: Sequence[str]) -> list[tuple[int, int, bool]]:
        truth = {self.vocabulary.canonical(noun) for noun in reference}
        return [(m.start, m.end, m.noun in truth) for m in mentions(answer, self.vocabulary)]

    def badness(self, counts: np.ndarray) -> tuple[float, ...]:
        hallucinated, mentioned, _, covered, present = counts[:5]
        return (
            hallucinated / max(1, mentioned),
            hallucinated,
            (present - covered) / max(1, present),
            -covered,
        )

    def verdict(self, counts: np.ndarray) -> str:
        if counts[0]:
            return "hallucinates"
        return "no hallucination" if counts[1] else "names nothing"
