"""CHAIR on COCO: the truth of a picture is what its instance annotations and its five human captions name."""

from functools import lru_cache
from pathlib import Path

import datasets
import numpy as np

from ...errors import UserError
from ...io import read_text
from .chair import COLUMNS, chair_i, chair_s, coverage, length
from .chair_released import ReleasedParser
from .coco_objects import COCO_OBJECTS, PLAYERS, READ_OVER
from .counting import CountMetric
from .released_text import nltk_lemmas
from .vocabulary import Vocabulary, mentions, word_count
from .yes_no import RULES


def read_synonyms(path: str | Path) -> dict[str, list[str]]:
    """The owners' `synonyms.txt`: one category a line, names separated by commas, the category's own name first.

    Raises:
        UserError: the file cannot be read or has no line.
    """
    table: dict[str, list[str]] = {}
    for line in read_text(path).splitlines():
        names = [name.strip().lower() for name in line.split(",") if name.strip()]
        if names:
            table[names[0]] = names[1:]
    if not table:
        raise UserError(f"{path}: no line in it. Expected one category a line: name, synonym, synonym.")
    return table


def coco_vocabulary(synonyms: str | Path | None = None) -> Vocabulary:
    """The owners' table where it is given, else ours. A name that two categories list goes to the later one.

    Raises:
        UserError: see `read_synonyms`.
    """
    if synonyms is None:
        table = {noun: list(names) for noun, names in COCO_OBJECTS.items()}
        table["person"] += PLAYERS
        return Vocabulary.build(table, [phrase for phrase in READ_OVER if phrase not in PLAYERS])
    owner = {name: noun for noun, names in read_synonyms(synonyms).items() for name in (noun, *names)}
    table = {}
    for name, noun in owner.items():
        table.setdefault(owner.get(noun, noun), []).append(name)
    return Vocabulary.build(
        {noun: [name for name in names if name != noun] for noun, names in table.items()},
        [phrase for phrase in READ_OVER if phrase not in owner and phrase not in PLAYERS],
    )


class ChairCoco(CountMetric):
    """CHAIR (arXiv 1809.02156) on COCO pictures, as `chair`, with the truth taken from the annotations.

    `references` are `{"instances": names of the annotated categories, "captions": human captions}`; an object is in the
    picture if either names it.

    Args:
        synonyms: the owners' `synonyms.txt`; without it a table of our own.
        rules: `"released"` reads captions as REVERSE's evaluator does (`chair_released`), which needs `synonyms` and
            NLTK with its data; then `coverage` is its "Recall" and `length` its "Len" (words after merging).

    Raises:
        UserError: `synonyms` or NLTK is missing for `"released"`, or a category is not in the table.
    """

    columns = COLUMNS
    statistics = {"chair_i": chair_i, "chair_s": chair_s, "coverage": coverage, "length": length}  # noqa: RUF012
    lower_is_better = frozenset({"chair_i", "chair_s"})
    not_fractions = frozenset({"length"})
    reference_fields = ("instances", "captions")
    reference_feature = {name: datasets.Sequence(datasets.Value("string")) for name in reference_fields}  # noqa: RUF012
    file_options = frozenset({"synonyms"})

    def __init__(self, synonyms: str | Path | None = None, rules: str = "ours", **kwargs):
        super().__init__(**kwargs)
        if rules not in RULES:
            raise UserError(f"chair_coco: rules is {rules!r}, expected one of {', '.join(RULES)}.")
        self.rules = rules
        if rules == "released":
            if synonyms is None:
                raise UserError(
                    "chair_coco: rules: released needs the owners' table, `synonyms: synonyms.txt`."
                )
            self._released = ReleasedParser.from_file(synonyms, nltk_lemmas())
        self.vocabulary = coco_vocabulary(synonyms)
        self._truth = lru_cache(maxsize=None)(self._find_truth)

    def _nouns(self, text: str) -> tuple[list[str], int]:
        if self.rules == "released":
            return self._released.nouns(text)
        return [mention.noun for mention in mentions(text, self.vocabulary)], word_count(text)

    def _find_truth(self, instances: tuple[str, ...], captions: tuple[str, ...]) -> frozenset[str]:
        found = set()
        for name in instances:
            noun = (
                self._released.canonical(name)
                if self.rules == "released"
                else self.vocabulary.canonical(name)
            )
            if noun is None:
                raise UserError(f"category {name!r} is not in the table of synonyms. Is it COCO's?")
            found.add(noun)
        for caption in captions:
            found.update(self._nouns(caption)[0])
        return frozenset(found)

    def truth(self, reference) -> frozenset[str]:
        """The objects of a picture."""
        return self._truth(tuple(reference["instances"]), tuple(reference["captions"]))

    def check(self, reference) -> None:
        for name in self.reference_fields:
            values = reference[name]
            if isinstance(values, str) or not all(isinstance(value, str) for value in values):
                raise UserError(f"field {name!r}: expected a list of texts, found {values!r:.80}.")
        self.truth(reference)

    def sample_counts(self, prediction: str, reference) -> tuple[int, ...]:
        named, words = self._nouns(prediction)
        truth = self.truth(reference)
        wrong = sum(noun not in truth for noun in named)
        covered = len(truth.intersection(named))
        return (wrong, len(named), int(wrong > 0), covered, len(truth), words, 1)

    def grade(self, phrase: str, reference) -> bool | None:
        named = set(self._nouns(phrase)[0])
        return named <= self.truth(reference) if named else None

    def marks(self, answer: str, reference) -> list[tuple[int, int, bool]]:
        if self.rules == "released":
            return []
        truth = self.truth(reference)
        return [(m.start, m.end, m.noun in truth) for m in mentions(answer, self.vocabulary)]

    def badness(self, counts: np.ndarray) -> tuple[float, ...]:
        hallucinated, mentioned, _, covered, present = counts[:5]
        missed = (present - covered) / max(1, present)
        return (hallucinated / max(1, mentioned), hallucinated, missed, -covered)

    def verdict(self, counts: np.ndarray) -> str:
        if counts[0]:
            return "hallucinates"
        return "no hallucination" if counts[1] else "names nothing"

    def truth_text(self, reference) -> str:
        return ", ".join(sorted(self.truth(reference)))
