"""CHAIR: which share of the objects a caption mentions is not in the picture (arXiv 1809.02156)."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import datasets
import numpy as np

from ...errors import UserError, short
from ...graders.grade import check_rules
from ...io import read_text
from ..bootstrap import ratio, statistics_of
from .counting import TEXTS, CountMetric
from .nouns import Mention, Vocabulary, mentions, nltk_lemmas, word_count

_WORDS = Path(__file__).parent / "words"
# COCO's 80 categories and the words that people use for them: a table of our own, in the format of the published
# `synonyms.txt`, which is larger and partly different
COCO_OBJECTS = _WORDS / "coco_objects.txt"
# phrases that hold a word of the table but name something else
COCO_READ_OVER = _WORDS / "coco_read_over.txt"
# columns that count every object of a caption once
DISTINCT = ("distinct_hallucinated", "distinct", "repeats")


def distinct_counts(nouns: Sequence[str], wrong: Callable[[str], bool]) -> tuple[int, int, int]:
    """`DISTINCT` of a caption: different nouns that are not there, all different ones, and whether any comes again."""
    distinct = set(nouns)
    return sum(map(wrong, distinct)), len(distinct), int(len(distinct) < len(nouns))


class ObjectMetric(CountMetric):
    """Base of metrics that look for hallucinated objects in captions; their first two columns are the hallucinated
    mentions and all mentions, and `DISTINCT` are the last three: a caption that says a true thing twice has more
    mentions, and by that fewer hallucinated ones among them."""

    def verdict(self, counts: np.ndarray) -> str:
        if counts[0]:
            return "hallucinates"
        return "no hallucination" if counts[1] else "names nothing"


class Chair(ObjectMetric):
    """CHAIR (arXiv 1809.02156, section 2.1): object hallucination in captions.

    `predictions` are captions, `references` lists of the nouns in each picture. Reported, all but the last as
    fractions: `chair_i` (hallucinated / all mentions), `chair_s` (captions with a hallucinated mention),
    `coverage` (objects of the picture that are mentioned; "recall" in the original), `length` (words), and two that the
    paper does not have: `chair_i_distinct` (`chair_i` with every object of a caption counted once) and `repeats` (captions
    that mention an object more than once).

    Hallucinated and mentioned objects are counted per mention (a repeated one counts again), covered and present ones
    once each, as the REVERSE evaluation does. A caption that mentions nothing has no hallucination; its price shows in
    `coverage`.

    Args:
        vocabulary: nouns, or a map of noun to synonyms, or a ready `Vocabulary`.
        ignore: phrases that are read over ("home plate").
    """

    columns = ("hallucinated", "mentioned", "any_hallucinated", "covered", "present", "words", "captions")
    columns += DISTINCT
    statistics = statistics_of(
        columns,
        chair_i=lambda t: ratio(t.hallucinated, t.mentioned),
        chair_s=lambda t: ratio(t.any_hallucinated, t.captions),
        coverage=lambda t: ratio(t.covered, t.present),
        length=lambda t: ratio(t.words, t.captions),
        chair_i_distinct=lambda t: ratio(t.distinct_hallucinated, t.distinct),
        repeats=lambda t: ratio(t.repeats, t.captions),
    )
    lower_is_better = frozenset({"chair_i", "chair_s", "chair_i_distinct", "repeats"})
    not_fractions = frozenset({"length"})
    reference_fields = datasets.Features(objects=TEXTS)

    def __init__(
        self,
        vocabulary: Vocabulary | Sequence[str] | Mapping[str, Sequence[str]],
        ignore: Sequence[str] = (),
        **kwargs,
    ):
        super().__init__(**kwargs)
        ready = isinstance(vocabulary, Vocabulary)
        self.vocabulary = vocabulary if ready else Vocabulary.build(vocabulary, ignore)

    def truth(self, reference: Sequence[str]) -> frozenset[str]:
        """The objects of a picture."""
        if isinstance(reference, str) or not all(isinstance(noun, str) for noun in reference):
            raise UserError(f"expected a list of nouns, found {reference!r}.")
        return frozenset(self.canonical(name) for name in reference)

    def canonical(self, name: str) -> str:
        """Raises UserError: the name is not in the vocabulary."""
        noun = self.vocabulary.canonical(name)
        if noun is None:
            raise UserError(
                f"object {name!r} is not in the vocabulary. Add it to the spec's vocabulary, or as a synonym."
            )
        return noun

    def mentions(self, text: str) -> list[Mention]:
        return mentions(text, self.vocabulary)

    def nouns(self, text: str) -> tuple[list[str], int]:
        """The objects that a text mentions, one entry a mention, and its number of words."""
        return [mention.noun for mention in self.mentions(text)], word_count(text)

    def sample_counts(self, prediction: str, reference) -> tuple[int, ...]:
        truth, (nouns, words) = self.truth(reference), self.nouns(prediction)
        wrong = sum(noun not in truth for noun in nouns)
        covered = len(truth.intersection(nouns))
        distinct = distinct_counts(nouns, lambda noun: noun not in truth)
        return wrong, len(nouns), int(wrong > 0), covered, len(truth), words, 1, *distinct

    def grade(self, phrase: str, reference) -> bool | None:
        nouns = set(self.nouns(phrase)[0])
        return nouns <= self.truth(reference) if nouns else None

    def marks(self, answer: str, reference) -> list[tuple[int, int, bool]]:
        truth = self.truth(reference)
        return [(m.start, m.end, m.noun in truth) for m in self.mentions(answer)]

    def missed(self, answer: str, reference) -> list[str]:
        return sorted(self.truth(reference).difference(self.nouns(answer)[0]))

    def badness(self, counts: np.ndarray) -> tuple[float, ...]:
        hallucinated, mentioned, _, covered, present = counts[:5]
        missed = (present - covered) / max(1, present)
        return (hallucinated / max(1, mentioned), hallucinated, missed, -covered)


def read_synonyms(path: str | Path) -> dict[str, list[str]]:
    """The owners' `synonyms.txt`: one category a line, names separated by commas, the category's own name first.

    Raises UserError: the file cannot be read or has no line.
    """
    table: dict[str, list[str]] = {}
    for line in read_text(path).splitlines():
        names = [name.strip().lower() for name in line.split(",") if name.strip()]
        if names:
            table[names[0]] = names[1:]
    if not table:
        raise UserError(f"{path}: no line in it. Expected one category a line: name, synonym, synonym.")
    return table


def coco_vocabulary(synonyms: str | Path = COCO_OBJECTS) -> Vocabulary:
    """The owners' table where it is given, else ours. A name that two categories list goes to the later one.

    Raises UserError: see `read_synonyms`.
    """
    category = {name: noun for noun, names in read_synonyms(synonyms).items() for name in (noun, *names)}
    table: dict[str, list[str]] = {}
    for name, noun in category.items():
        table.setdefault(category.get(noun, noun), []).append(name)
    return Vocabulary.build(
        {noun: [name for name in names if name != noun] for noun, names in table.items()},
        [phrase for phrase in read_text(COCO_READ_OVER).splitlines() if phrase not in category],
    )


class ChairCoco(Chair):
    """CHAIR (arXiv 1809.02156) on COCO pictures, as `chair`, with the truth taken from the annotations.

    `references` are `{"instances": names of the annotated categories, "captions": human captions}`; an object is in the
    picture if either names it.

    Args:
        synonyms: the owners' `synonyms.txt`; without it a table of our own.
        rules: `"released"` reads captions as REVERSE's evaluator does (`ReleasedParser`), which needs `synonyms` and
            NLTK with its data; then `coverage` is its "Recall" and `length` its "Len" (words after merging).
    """

    reference_fields = datasets.Features(instances=TEXTS, captions=TEXTS)
    file_options = frozenset({"synonyms"})

    def __init__(self, synonyms: str | Path | None = None, rules: str = "ours", **kwargs):
        if check_rules(rules, "metric_options") == "released" and synonyms is None:
            raise UserError("rules: released needs the owners' table, `metric_options: synonyms`.")
        super().__init__(coco_vocabulary(synonyms or COCO_OBJECTS), **kwargs)
        self._released = self.released_parser(read_text(synonyms)) if rules == "released" else None
        self._truth = lru_cache(maxsize=None)(self._find_truth)

    @staticmethod
    def released_parser(synonyms: str) -> "ReleasedParser":
        """Raises UserError: NLTK or its data are not installed."""
        return ReleasedParser(released_table(synonyms), nltk_lemmas())

    def nouns(self, text: str) -> tuple[list[str], int]:
        return super().nouns(text) if self._released is None else self._released.nouns(text)

    def canonical(self, name: str) -> str:
        names = self.vocabulary.canonical if self._released is None else self._released.table.get
        noun = names(name)
        if noun is None:
            raise UserError(f"category {name!r} is not in the table of synonyms. Is it COCO's?")
        return noun

    def truth(self, reference: Mapping[str, Sequence[str]]) -> frozenset[str]:
        return self._truth(tuple(reference["instances"]), tuple(reference["captions"]))

    def _find_truth(self, instances: tuple[str, ...], captions: tuple[str, ...]) -> frozenset[str]:
        objects = {self.canonical(name) for name in instances}
        for caption in captions:
            objects.update(self.nouns(caption)[0])
        return frozenset(objects)

    def check(self, reference: Mapping[str, Sequence[str]]) -> None:
        for name in self.reference_fields:
            values = reference[name]
            if isinstance(values, str) or not all(isinstance(value, str) for value in values):
                raise UserError(f"field {name!r}: expected a list of texts, found {short(values)}.")
        self.truth(reference)

    def marks(self, answer: str, reference) -> list[tuple[int, int, bool]]:
        # lemmas have lost their places in the caption
        return super().marks(answer, reference) if self._released is None else []

    def truth_text(self, reference) -> str:
        return ", ".join(sorted(self.truth(reference)))


# How the released CHAIR evaluator (REVERSE's, after LisaAnne/Hallucination) finds objects in a caption.
_DOUBLE = (
    "motor bike, motor cycle, air plane, traffic light, street light, traffic signal, stop light, fire hydrant, "
    "stop sign, parking meter, suit case, sports ball, baseball bat, baseball glove, tennis racket, wine glass, "
    "hot dog, cell phone, mobile phone, teddy bear, hair drier, potted plant, bow tie, laptop computer, "
    "stove top oven, home plate, train track"
)
_ANIMALS = "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub"
DOUBLE_WORDS = {
    **{phrase: phrase for phrase in _DOUBLE.split(", ")},
    **{f"{age} {animal}": animal for animal in _ANIMALS.split() for age in ("baby", "adult")},
    "passenger jet": "jet",
    "passenger train": "train",
    "bow tie": "tie",
    "toilet seat": "toilet",
    "wine glas": "wine glass",
}


def merge_words(
    words: Sequence[str], pairs: Mapping[str, str] = DOUBLE_WORDS, rest: bool = True
) -> list[str]:
    """Listed pairs become one word, from left to right; without `rest`, only they are given."""
    merged, index = [], 0
    while index < len(words):
        pair = " ".join(words[index : index + 2])
        if index + 1 < len(words) and pair in pairs:
            merged.append(pairs[pair])
            index += 2
        else:
            merged += [words[index]] if rest else []
            index += 1
    return merged


def released_table(text: str) -> dict[str, str]:
    """Name -> first word of its row, from the content of `synonyms.txt`."""
    table = {}
    for line in text.split("\n"):
        names = line.strip().split(", ")
        table |= dict.fromkeys(names, names[0])
    return table


class ReleasedParser:
    """Caption -> node words, by the rules of the released evaluator.

    The rules, on lemmas of the lower-cased caption: merge listed two-word objects from left to right; drop "seat" where
    "toilet" stands, too; keep words of the synonym table; map each to the first word of its row. Quirks that are kept:

    - an empty line of the table puts the empty word into the vocabulary;
    - names inside a row keep a blank that stands before them beyond the separating one, and then never match
      (" motor bike"); blanks around a row are cut off;
    - upper-case names ("iPhone") never match the lower-cased text;
    - later rows overwrite earlier ones that list the same name;
    - names of three words ("stove top oven") cannot match; "orange", "bow" or "turkey" match whatever they mean;
    - "home plate" and "train track" are merged only so that "plate" and "train" are not counted.

    Args:
        table: name -> node word.
        lemmas: text -> lemmas of its lower-cased tokens; NLTK's in real use.
        pairs: two-word objects, and what each is merged to.
    """

    def __init__(
        self,
        table: Mapping[str, str],
        lemmas: Callable[[str], Sequence[str]],
        pairs: Mapping[str, str] = DOUBLE_WORDS,
    ):
        self.table, self.lemmas, self.pairs = table, lemmas, pairs

    def nouns(self, caption: str) -> tuple[list[str], int]:
        """Node words in order, one a mention, and the number of words after merging (its "Len": full stops are words,
        and so is a dropped seat)."""
        words = merge_words(self.lemmas(caption), self.pairs)
        return self.nodes(words), len(words)

    def nodes(self, words: Sequence[str]) -> list[str]:
        """Node words of those words that are in the table."""
        seat = "seat" if "toilet" in words else None
        return [self.table[word] for word in words if word in self.table and word != seat]
