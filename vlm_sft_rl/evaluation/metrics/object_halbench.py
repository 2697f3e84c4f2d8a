"""Object HalBench (arXiv 2312.00849): CHAIR on COCO pictures over the objects that a language model reads off an answer."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

import datasets
import numpy as np

from ...data.conclusions import without_thinking
from ..bootstrap import ratio, statistics_of
from .chair import (
    DISTINCT,
    DOUBLE_WORDS,
    Chair,
    ChairCoco,
    ReleasedParser,
    distinct_counts,
    merge_words,
    released_table,
)
from .counting import TEXT
from .nouns import nltk_lemmas, plural, spacy_tokens

SHORT = 3  # an answer of at most so many words names nothing
_LIST = re.compile(r"\[[^\[\]]*\]")
_NOUNS = frozenset(("NN", "NNS", "NNP", "NNPS"))


def listed_objects(reply: str) -> list[str] | None:
    """The last JSON list of texts in a judge's reply; None without one."""
    for text in reversed(_LIST.findall(without_thinking(reply))):
        try:
            names = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if all(isinstance(name, str) for name in names):
            return names
    return None


class ObjectWords(ReleasedParser):
    """How the released evaluator finds objects in captions and in the names that the judge lists.

    Captions are read as `ReleasedParser` does, with every token taken for a noun, blanks around names cut off, and all
    two-word names of the table merged. Names are read on spaCy's lemmas; quirks that are kept:

    - where a name holds a listed pair, only its pairs count ("dog on dining table" is a dining table);
    - else each run of nouns is one word, so that "kitchen table" is no object of the table;
    - a word counts once an answer, while two words for one category ("man", "woman") count twice;
    - "seat" does not count in an answer that names a toilet.

    Args:
        tokens: text -> (lemma, tag) of its tokens; spaCy's in real use.
    """

    def __init__(
        self,
        synonyms: str,
        lemmas: Callable[[str], Sequence[str]],
        tokens: Callable[[str], Sequence[tuple[str, str]]],
    ):
        table = {name.strip(): node for name, node in released_table(synonyms).items()}
        pairs = {name: name for name in table if " " in name}
        super().__init__(table, lemmas, pairs | DOUBLE_WORDS)
        self.tokens = tokens

    def words(self, names: Sequence[str]) -> list[str]:
        """Different words in those names, whether they are in the table or not."""
        words: dict[str, None] = {}
        for name in names:
            tokens = self.tokens(f"a {name}")
            runs = groupby(tokens, key=lambda token: token[1] in _NOUNS)
            nouns = [" ".join(lemma for lemma, _ in run) for is_noun, run in runs if is_noun]
            pairs = merge_words([lemma for lemma, _ in tokens], self.pairs, rest=False)
            words.update(dict.fromkeys(pairs or nouns))
        return list(words)


class ObjectHalBench(ChairCoco):
    """Object HalBench (arXiv 2312.00849): CHAIR on COCO pictures, where a judge lists the objects of an answer.

    The truth is that of `chair_coco`. The judge replies with a JSON list of names; only what it lists is looked up, never
    the answer itself. Answers of up to three words name nothing and are not shown to it. Answers without a list are left
    out of all figures and counted as `unjudged`. `predictions` are `{"answer", "judgement"}`.

    Reported, as the owners' script has them: `chair_i` (CHAIRi: hallucinated / all different words), `chair_s` (CHAIRs:
    answers with a hallucinated one), `chair_s_refine` (CHAIRs_refine: the same among answers that name a COCO object; what
    their summary prints as "Response Hall"), `coverage` (obj_rec) and `length` (words). `chair_i_distinct` counts categories
    in place of words. Phrases of a verifying model are graded by the table alone (`grade`), without the judge.

    Args:
        synonyms: the owners' `synonyms_refine.txt`; without it a table of our own.
        rules: `"released"` reads captions and names as the owners' script does (`ObjectWords`), which needs `synonyms`, NLTK
            and spaCy with their data. Ours finds the table's words in each name, plurals taken for their singular.
    """

    columns = (*Chair.columns[: -len(DISTINCT)], "naming", "unjudged", *DISTINCT)
    statistics = statistics_of(
        columns,
        chair_i=lambda t: ratio(t.hallucinated, t.mentioned),
        chair_s=lambda t: ratio(t.any_hallucinated, t.captions),
        chair_s_refine=lambda t: ratio(t.any_hallucinated, t.naming),
        coverage=lambda t: ratio(t.covered, t.present),
        length=lambda t: ratio(t.words, t.captions),
        chair_i_distinct=lambda t: ratio(t.distinct_hallucinated, t.distinct),
        unjudged=lambda t: ratio(t.unjudged, t.captions + t.unjudged),
    )
    lower_is_better = frozenset({"chair_i", "chair_s", "chair_s_refine", "chair_i_distinct", "unjudged"})
    prediction_field = "judgement"
    prediction_feature = datasets.Features(answer=TEXT, judgement=TEXT)

    @staticmethod
    def released_parser(synonyms: str) -> ObjectWords:
        """Raises UserError: NLTK, spaCy or their data are not installed."""
        return ObjectWords(synonyms, nltk_lemmas(by_kind=False), spacy_tokens())

    def asks_judge(self, answer: str) -> bool:
        return len(answer.split()) > SHORT

    def prediction_of(self, sample: Mapping) -> dict:
        return {"answer": sample["answer"], "judgement": super().prediction_of(sample)}

    def objects(self, names: Sequence[str]) -> list[str]:
        """The category of every different word in the listed names."""
        if self._released is not None:
            return self._released.nodes(self._released.words(names))
        words = {name[m.start : m.end].lower(): m.noun for name in names for m in self.mentions(name)}
        plurals = {form for word in words if (form := plural(word)) != word}
        return [noun for word, noun in words.items() if word not in plurals]

    def sample_counts(self, prediction: Mapping, reference: Mapping) -> tuple[int, ...]:
        answer = prediction["answer"]
        names = listed_objects(prediction["judgement"]) if self.asks_judge(answer) else []
        if names is None:
            return tuple(int(column == "unjudged") for column in self.columns)
        truth, nouns = self.truth(reference), self.objects(names)
        wrong = sum(noun not in truth for noun in nouns)
        length = len(answer.strip().split(" "))
        counts = (wrong, len(nouns), int(wrong > 0), len(truth.intersection(nouns)), len(truth), length, 1)
        return *counts, int(bool(nouns)), 0, *distinct_counts(nouns, lambda noun: noun not in truth)

    def marks(self, answer: str, reference) -> list[tuple[int, int, bool]]:
        return []  # what an answer names is in the judge's reply

    def missed(self, answer: str, reference) -> list[str]:
        return []

    def badness(self, counts: np.ndarray) -> tuple[float, ...]:
        return (counts[self.columns.index("unjudged")], *super().badness(counts))

    def verdict(self, counts: np.ndarray) -> str:
        return "unjudged" if counts[self.columns.index("unjudged")] else super().verdict(counts)
