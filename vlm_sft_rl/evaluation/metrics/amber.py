"""AMBER's descriptions (arXiv 2311.07397): hallucination in texts about one set of annotated pictures."""

from collections.abc import Callable, Mapping, Sequence
from operator import eq
from pathlib import Path

import datasets
import numpy as np

from ...errors import UserError, short
from ...graders.grade import check_rules
from ...io import read_json, read_text
from ...shapes import Map, require
from ..bootstrap import ratio, statistics_of
from .chair import DISTINCT, ObjectMetric, distinct_counts
from .counting import TEXTS
from .nouns import Mention, Vocabulary, mentions, nltk_nouns, spacy_similarity, words_of

SIMILAR = 0.8


def _word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


# words of the vocabulary that are also verbs or adjectives are told apart by the word before them
_DETERMINERS = _word_set(
    "a an the this another one two three four five six some each every empty his her its their my your no"
)
# what stands before "can" where it is a thing
_KINDS_OF_CAN = _word_set(
    "trash garbage tin soda beer metal aluminum aluminium spray watering paint recycling rubbish food oil cola coke "
    "drink soup red green blue white black silver small large"
)
_ALSO_VERBS = _word_set(
    "watch support drink lock switch sound file spray ring board stage tie note bat skate leave paddle track sled "
    "ship fish box sink"
)
_BEFORE_VERBS = _word_set(
    "to can could may might will would shall should must do does did not people persons they we you i who and then "
    "she he it which men women children"
)
_NEVER = frozenset(("hot", "leave"))  # in the vocabulary because of "hot dog" and "leaves"


def noun_mentions(text: str, vocabulary: Vocabulary) -> list[Mention]:
    """Mentions of the vocabulary in `text` without those that are no nouns there ("people can watch", "hot day")."""
    words = words_of(text)
    previous = {start: words[i - 1][0] if i else "" for i, (_, start, _) in enumerate(words)}

    def is_noun(mention: Mention) -> bool:
        word, before = text[mention.start : mention.end].lower(), previous[mention.start]
        if word == "can":
            return before in _DETERMINERS or before in _KINDS_OF_CAN
        return word not in _NEVER and not (word in _ALSO_VERBS and before in _BEFORE_VERBS)

    return [mention for mention in mentions(text, vocabulary) if is_noun(mention)]


def our_counts(
    nouns: Sequence[str],
    truth: Sequence[str],
    targets: Sequence[str],
    relation: Mapping[str, Sequence[str]],
    safe_words: frozenset[str],
) -> tuple[int, ...]:
    """Counts of one description; words match their root and its listed associates only.

    Args:
        nouns: nouns of AMBER's vocabulary in the description, one entry a mention.
        truth: annotated objects of the picture.
        targets: annotated objects that people tend to imagine there ("hallu").
        relation: word -> associated words.
        safe_words: words that are never held against a description.
    """
    safe = [{word, *relation.get(word, ())} for word in dict.fromkeys(truth)]
    imagined = [{word, *relation.get(word, ())} for word in dict.fromkeys(targets)]
    named = [noun for noun in nouns if noun not in safe_words]
    all_safe = set().union(*safe)
    wrong = sum(noun not in all_safe for noun in named)
    covered = sum(bool(words.intersection(named)) for words in safe)
    cognitive = sum(bool((words - all_safe).intersection(named)) for words in imagined)
    distinct = distinct_counts(nouns, lambda noun: noun not in safe_words and noun not in all_safe)
    return wrong, len(nouns), int(wrong > 0), covered, len(safe), cognitive, len(imagined), 1, *distinct


def released_counts(
    nouns: Sequence[str],
    truth: Sequence[str],
    targets: Sequence[str],
    relation: Mapping[str, Sequence[str]],
    safe_words: frozenset[str],
    similar: Callable[[str, str], bool],
) -> tuple[int, ...]:
    """The same by the released rules (REVERSE's and the owners' evaluators).

    Quirks that are kept: only the first root that lists a noun is marked; a noun outside the truth marks an imagined
    object by similarity even if it did so exactly before; a similar word saves a noun from counting as hallucinated but
    may at the same time have marked an imagined object; safe words stay in the denominator; a repeated annotation
    counts twice.
    """

    def search_order(roots: Sequence[str]) -> list[tuple[str, int]]:
        """`(word, index of its root)`: all associates first, then the roots."""
        listed = [(word, index) for index, root in enumerate(roots) for word in relation.get(root, ())]
        return listed + [(root, index) for index, root in enumerate(roots)]

    def mark(
        marked: list[bool], words: list[tuple[str, int]], noun: str, matches: Callable[[str, str], bool]
    ) -> bool:
        """Marks the first root that has a word like `noun`; whether there was one."""
        root = next((root for word, root in words if matches(noun, word)), None)
        if root is not None:
            marked[root] = True
        return root is not None

    true_words, target_words = search_order(truth), search_order(targets)
    covered, imagined = [False] * len(truth), [False] * len(targets)
    hallucinated = []
    for noun in nouns:
        if noun in safe_words or mark(covered, true_words, noun, eq):
            continue
        mark(imagined, target_words, noun, eq)
        mark(imagined, target_words, noun, similar)
        if not mark(covered, true_words, noun, similar):
            hallucinated.append(noun)
    wrong = len(hallucinated)
    counts = (wrong, len(nouns), int(wrong > 0), sum(covered), len(truth), sum(imagined), len(targets), 1)
    return counts + distinct_counts(nouns, lambda noun: noun in hallucinated)


class AmberGenerative(ObjectMetric):
    """Descriptions of AMBER's pictures (arXiv 2311.07397).

    `chair` (hallucinated nouns / nouns), `cover` (annotated objects named),
    `hal` (descriptions with a hallucinated noun), `cog` (typical human imaginations named); fractions. Not in the paper:
    `chair_distinct` (`chair` with every noun of a description counted once), `repeats` (descriptions with a noun twice).

    `references` are `{"truth": […], "hallu": […]}`. Only nouns of AMBER's own vocabulary are looked at.

    Args:
        relation: the owners' `relation.json`, or its content (word -> associated words).
        safe_words: the owners' `safe_words.txt`, or the words.
        rules: `"ours"` finds nouns by the closed vocabulary (any case, plurals, longest phrase; words that are also
            verbs by a rule, see `noun_mentions`) and matches words and listed associates only. `"released"` does as the
            published evaluators: NLTK's tagger and lemmatiser on the text as it is, and spaCy's `en_core_web_lg`
            similarity above `similarity`. It needs both installed.
        similarity: threshold of `"released"`; its quirks stand at `released_counts`.
    """

    columns = (
        *("hallucinated", "nouns", "any_hallucinated", "covered", "truths", "cognitive", "targets"),
        "responses",
        *DISTINCT,
    )
    statistics = statistics_of(
        columns,
        chair=lambda t: ratio(t.hallucinated, t.nouns),
        cover=lambda t: ratio(t.covered, t.truths),
        hal=lambda t: ratio(t.any_hallucinated, t.responses),
        cog=lambda t: ratio(t.cognitive, t.targets),
        chair_distinct=lambda t: ratio(t.distinct_hallucinated, t.distinct),
        repeats=lambda t: ratio(t.repeats, t.responses),
    )
    lower_is_better = frozenset({"chair", "hal", "cog", "chair_distinct", "repeats"})
    reference_fields = datasets.Features(truth=TEXTS, hallu=TEXTS)
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
        self.rules = check_rules(rules, "metric_options")
        cure = "Fetch it again from AMBER's owners."
        content = read_json(relation) if isinstance(relation, str | Path) else dict(relation)
        self.relation = require(content, Map([str]), str(relation)[:200], cure)
        if isinstance(safe_words, str | Path):
            safe_words = [line for line in read_text(safe_words).splitlines() if line]
        self.words = frozenset(word for root, others in self.relation.items() for word in (root, *others))
        if not self.words:
            raise UserError(f"amber_generative: {str(relation)[:200]} holds no words. {cure}")
        if rules == "released":
            self.safe_words = frozenset(safe_words)
            self._nouns, self._similar = nltk_nouns(), spacy_similarity(similarity)
        else:
            # mentions come in lower case, and the table has words such as TV
            self.safe_words = frozenset(_lower(safe_words))
            self.vocabulary = Vocabulary.build(sorted(set(_lower(self.words))))
            self.associates = {root.lower(): _lower(others) for root, others in self.relation.items()}

    def nouns(self, text: str) -> list[str]:
        """Nouns of AMBER's vocabulary in `text`, one entry a mention."""
        if self.rules == "released":
            return [noun for noun in self._nouns(text) if noun in self.words]
        return [mention.noun for mention in noun_mentions(text, self.vocabulary)]

    def check(self, reference: Mapping[str, Sequence[str]]) -> None:
        for name in self.reference_fields:
            words = reference[name]
            if isinstance(words, str) or not all(isinstance(word, str) for word in words):
                raise UserError(f"field {name!r}: expected a list of nouns, found {short(words)}.")
            for word in words:
                if word not in self.relation:
                    raise UserError(
                        f"field {name!r}: {word!r} is not in relation.json. Are both files of one release of AMBER?"
                    )

    def sample_counts(self, prediction: str, reference: Mapping[str, Sequence[str]]) -> tuple[int, ...]:
        nouns, truth, targets = self.nouns(prediction), reference["truth"], reference["hallu"]
        if self.rules == "released":
            return released_counts(nouns, truth, targets, self.relation, self.safe_words, self._similar)
        return our_counts(nouns, _lower(truth), _lower(targets), self.associates, self.safe_words)

    def grade(self, phrase: str, reference: Mapping[str, Sequence[str]]) -> bool | None:
        wrong, nouns = self.sample_counts(phrase, reference)[:2]
        return not wrong if nouns else None

    def marks(self, answer: str, reference: Mapping[str, Sequence[str]]) -> list[tuple[int, int, bool]]:
        if self.rules == "released":
            return []
        truth = _lower(reference["truth"])
        safe = self.safe_words.union(truth, *(self.associates.get(root, ()) for root in truth))
        return [(m.start, m.end, m.noun in safe) for m in noun_mentions(answer, self.vocabulary)]

    def missed(self, answer: str, reference: Mapping[str, Sequence[str]]) -> list[str]:
        covered = self.columns.index("covered")
        return [
            word
            for word in reference["truth"]
            if not self.sample_counts(answer, {"truth": [word], "hallu": []})[covered]
        ]

    def badness(self, counts: np.ndarray) -> tuple[float, ...]:
        return (counts[0] / max(1, counts[1]), counts[0], 1 - counts[3] / max(1, counts[4]))

    def truth_text(self, reference: Mapping[str, Sequence[str]]) -> str:
        return ", ".join(reference["truth"])


def _lower(words: Sequence[str]) -> list[str]:
    return [word.lower() for word in words]
