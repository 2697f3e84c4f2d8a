"""AMBER (arXiv 2311.07397): hallucination in descriptions, and in yes/no answers, of one set of annotated pictures."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np

from ...errors import UserError
from ...io import read_json, read_text
from ..bootstrap import ratio
from .amber_nouns import noun_mentions
from .counting import CountMetric
from .released_text import nltk_nouns, spacy_similarity
from .vocabulary import Vocabulary
from .yes_no import COLUMNS as ANSWER_COLUMNS
from .yes_no import RULES, YesNo, accuracy, unreadable, yes_ratio

COLUMNS = (
    "hallucinated",
    "nouns",
    "any_hallucinated",
    "covered",
    "truths",
    "cognitive",
    "targets",
    "responses",
)
SIMILAR = 0.8


def strict_counts(
    nouns: Sequence[str],
    truth: Sequence[str],
    targets: Sequence[str],
    relation: Mapping[str, Sequence[str]],
    safe_words: frozenset[str],
) -> tuple[int, ...]:
    """Counts of one description, in the order of `COLUMNS`; words match their root and its listed associates only.

    Args:
        nouns: nouns of AMBER's vocabulary in the description, one entry a mention.
        truth: annotated objects of the picture.
        targets: annotated objects that people tend to imagine there ("hallu").
        relation: word -> associated words.
        safe_words: words that are never held against a description.
    """
    safe = {word: {word, *relation.get(word, ())} for word in truth}
    imagined = {word: {word, *relation.get(word, ())} for word in targets}
    named = [noun for noun in nouns if noun not in safe_words]
    wrong = sum(not any(noun in words for words in safe.values()) for noun in named)
    said = set(named)
    covered = sum(bool(words & said) for words in safe.values())
    cognitive = sum(bool((words - set().union(*safe.values(), set())) & said) for words in imagined.values())
    return (wrong, len(nouns), int(wrong > 0), covered, len(safe), cognitive, len(imagined), 1)


def released_counts(
    nouns: Sequence[str],
    truth: Sequence[str],
    targets: Sequence[str],
    relation: Mapping[str, Sequence[str]],
    safe_words: frozenset[str],
    similar: Callable[[str, str], bool],
) -> tuple[int, ...]:
    """The released rules (REVERSE's and the owners' evaluators), in the order of `COLUMNS`.

    Quirks that are kept: only the first root that lists a noun is marked; a noun outside the truth marks an imagined
    object by similarity even if it did so exactly before; a similar word saves a noun from counting as hallucinated but
    may at the same time have marked an imagined object; safe words stay in the denominator; a repeated annotation
    counts twice.
    """
    safe_words_of = _associates(truth, relation)
    target_words_of = _associates(targets, relation)
    covered, imagined = [False] * len(truth), [False] * len(targets)
    wrong = 0
    for noun in nouns:
        if noun in safe_words:
            continue
        root = _first(safe_words_of, lambda word, noun=noun: word == noun)
        if root is not None:
            covered[root] = True
            continue
        for test in (lambda word, noun=noun: word == noun, lambda word, noun=noun: similar(noun, word)):
            root = _first(target_words_of, test)
            if root is not None:
                imagined[root] = True
        root = _first(safe_words_of, lambda word, noun=noun: similar(noun, word))
        if root is not None:
            covered[root] = True
        else:
            wrong += 1
    return (
        wrong,
        len(nouns),
        int(wrong > 0),
        sum(covered),
        len(truth),
        sum(imagined),
        len(targets),
        1,
    )


def _associates(roots: Sequence[str], relation: Mapping[str, Sequence[str]]) -> list[tuple[str, int]]:
    """`(word, index of its root)`: all associates first, then the roots, which is the order that is searched."""
    listed = [(word, index) for index, root in enumerate(roots) for word in relation.get(root, ())]
    return listed + [(root, index) for index, root in enumerate(roots)]


def _first(words: Sequence[tuple[str, int]], test: Callable[[str], bool]) -> int | None:
    return next((root for word, root in words if test(word)), None)


def amber_chair(totals: np.ndarray) -> np.ndarray:
    return ratio(totals[..., 0], totals[..., 1])


def amber_cover(totals: np.ndarray) -> np.ndarray:
    return ratio(totals[..., 3], totals[..., 4])


def amber_hal(totals: np.ndarray) -> np.ndarray:
    return ratio(totals[..., 2], totals[..., 7])


def amber_cog(totals: np.ndarray) -> np.ndarray:
    return ratio(totals[..., 5], totals[..., 6])


class AmberGenerative(CountMetric):
    """Descriptions of AMBER's pictures (arXiv 2311.07397).

    `chair` (hallucinated nouns / nouns), `cover` (annotated objects named),
    `hal` (descriptions with a hallucinated noun), `cog` (typical human imaginations named); fractions.

    `references` are `{"truth": […], "hallu": […]}`. Only nouns of AMBER's own vocabulary are looked at.

    Args:
        relation: the owners' `relation.json`, or its content (word -> associated words).
        safe_words: the owners' `safe_words.txt`, or the words.
        rules: `"ours"` finds nouns by the closed vocabulary (any case, plurals, longest phrase; words that are also
            verbs by a rule, see `amber_nouns`) and matches words and listed associates only. `"released"` does as the
            published evaluators: NLTK's tagger and lemmatiser on the text as it is, and spaCy's `en_core_web_lg`
            similarity above `similarity`. It needs both installed.
        similarity: threshold of `"released"`; its quirks stand at `released_counts`.

    Raises:
        UserError: `relation.json` is empty, an annotated word is not in it, or NLTK or spaCy is missing.
    """

    columns = COLUMNS
    statistics = {"chair": amber_chair, "cover": amber_cover, "hal": amber_hal, "cog": amber_cog}  # noqa: RUF012
    lower_is_better = frozenset({"chair", "hal", "cog"})
    reference_fields = ("truth", "hallu")
    reference_feature = {  # noqa: RUF012
        "truth": datasets.Sequence(datasets.Value("string")),
        "hallu": datasets.Sequence(datasets.Value("string")),
    }
    file_options = frozenset({"relation", "safe_words"})

    def __init__(
        self,
        relation: str | Path | Mapping[str, Sequence[str]],
        safe_words: str | Path | Sequence[str] = (),
        rules: str = "ours",
        similarity: float = SIMILAR,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if rules not in RULES:
            raise UserError(f"amber_generative: rules is {rules!r}, expected one of {', '.join(RULES)}.")
        self.rules = rules
        self.relation = read_json(relation) if isinstance(relation, str | Path) else dict(relation)
        if isinstance(safe_words, str | Path):
            safe_words = [line for line in read_text(safe_words).splitlines() if line]
        self.safe_words = frozenset(safe_words)
        words = {word for root, others in self.relation.items() for word in (root, *others)}
        if not words:
            raise UserError(
                "amber_generative: relation.json holds no words. Fetch it again from AMBER's owners."
            )
        self.words = frozenset(words)
        if rules == "released":
            self._nouns, self._similar = nltk_nouns(), spacy_similarity(similarity)
        else:
            # mentions come in lower case, and the table has words such as TV
            self.vocabulary = Vocabulary.build(sorted({word.lower() for word in words}))
            self.safe_words = frozenset(word.lower() for word in self.safe_words)
            self.associates = {
                root.lower(): [word.lower() for word in others] for root, others in self.relation.items()
            }

    def nouns(self, text: str) -> list[str]:
        """Nouns of AMBER's vocabulary in `text`, one entry a mention."""
        if self.rules == "released":
            return [noun for noun in self._nouns(text) if noun in self.words]
        return [mention.noun for mention in noun_mentions(text, self.vocabulary)]

    def check(self, reference) -> None:
        for name in ("truth", "hallu"):
            words = reference[name]
            if isinstance(words, str) or not all(isinstance(word, str) for word in words):
                raise UserError(f"field {name!r}: expected a list of nouns, found {words!r:.80}.")
            for word in words:
                if word not in self.relation:
                    raise UserError(
                        f"field {name!r}: {word!r} is not in relation.json. Are both files of one release of AMBER?"
                    )

    def sample_counts(self, prediction: str, reference) -> tuple[int, ...]:
        found, truth, hallu = self.nouns(prediction), reference["truth"], reference["hallu"]
        if self.rules == "released":
            return released_counts(found, truth, hallu, self.relation, self.safe_words, self._similar)
        lower = ([word.lower() for word in words] for words in (truth, hallu))
        return strict_counts(found, *lower, self.associates, self.safe_words)

    def grade(self, phrase: str, reference) -> bool | None:
        counts = self.sample_counts(phrase, reference)
        return None if not counts[1] else not counts[0]

    def marks(self, answer: str, reference) -> list[tuple[int, int, bool]]:
        if self.rules == "released":
            return []
        safe = {
            w for root in reference["truth"] for w in (root, *self.relation.get(root, ()))
        } | self.safe_words
        return [(m.start, m.end, m.noun in safe) for m in noun_mentions(answer, self.vocabulary)]

    def badness(self, counts: np.ndarray) -> tuple[float, ...]:
        return (counts[0] / max(1, counts[1]), counts[0], 1 - counts[3] / max(1, counts[4]))

    def verdict(self, counts: np.ndarray) -> str:
        if counts[0]:
            return "hallucinates"
        return "no hallucination" if counts[1] else "names nothing"

    def truth_text(self, reference) -> str:
        return ", ".join(reference["truth"])


def parse_amber(answer: str) -> str | None:
    """The released rule: lower-cased text that contains "yes" says yes, else text that contains "no" says no.

    Substrings count: "eyes" says yes, "know" and "not" say no.
    """
    text = answer.lower()
    if "yes" in text:
        return "yes"
    return "no" if "no" in text else None


def no_precision(totals: np.ndarray) -> np.ndarray:
    return ratio(totals[..., 3], totals[..., 3] + totals[..., 2])


def no_recall(totals: np.ndarray) -> np.ndarray:
    return ratio(totals[..., 3], totals[..., 3] + totals[..., 1] + totals[..., 5])


def no_f1(totals: np.ndarray) -> np.ndarray:
    """2PR / (P + R); the released 1e-6 in the denominator does not reach a printed digit."""
    wrong = totals[..., 1] + totals[..., 2] + totals[..., 5]
    return ratio(2 * totals[..., 3], 2 * totals[..., 3] + wrong)


class AmberDiscriminative(YesNo):
    """AMBER's yes/no questions (arXiv 2311.07397). The positive class is "no": a hallucination is a wrong yes.

    `f1`, `precision`, `recall` of no, `accuracy`, `yes_ratio`, `unreadable`. With `rules: released` answers are
    read by `parse_amber`; those it cannot read are wrong, as by our rules.
    """

    columns = ANSWER_COLUMNS
    statistics = {  # noqa: RUF012
        "f1": no_f1,
        "accuracy": accuracy,
        "precision": no_precision,
        "recall": no_recall,
        "yes_ratio": yes_ratio,
        "unreadable": unreadable,
    }

    def parse(self, answer: str) -> str | None:
        return parse_amber(answer) if self.rules == "released" else super().parse(answer)
