"""CIDEr-D (arXiv 1411.5726): agreement of a caption's n-grams with those of several human captions.

An implementation of our own: `pycocoevalcap` gives the same figures on the same tokens, but is a download of 100 MB, most
of it METEOR's and SPICE's Java programs, and takes 1.7 times as long. METEOR is asked of it.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import datasets
import numpy as np

from ...errors import UserError, short
from ..bootstrap import ratio, statistics_of
from .counting import TEXT, TEXTS, CountMetric

LONGEST = 4
SIGMA = 6.0


def tokenize(text: str) -> list[str]:
    """Words in lower case without punctuation; clitics apart ("it's" -> it 's, "don't" -> do n't), as PTB splits them."""
    tokens = []
    for word in re.findall(r"[a-z0-9]+(?:[-.,'’][a-z0-9]+)*|'[a-z]+", text.lower().replace("’", "'")):
        match = re.fullmatch(r"(.+?)(n't|'(?:s|re|ve|ll|d|m))", word)
        tokens += match.groups() if match else [word]
    return tokens


def ngrams(tokens: Sequence[str]) -> Counter:
    return Counter(
        tuple(tokens[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(tokens) - n + 1)
    )


def cider_scores(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """CIDEr-D of every caption, times 10 as is usual; document frequencies are those of all `references`.

    For n = 1..4: cosine of tf-idf vectors, the candidate's counts clipped to the reference's, times a Gaussian of the
    difference in length (sigma 6); mean over n and over the references.

    Raises UserError: a picture without references.
    """
    for index, captions in enumerate(references):
        if not captions:
            raise UserError(f"picture {index}: no reference caption.")
    counted = [[ngrams(tokenize(caption)) for caption in captions] for captions in references]
    frequency = Counter(gram for captions in counted for gram in {g for counts in captions for g in counts})
    log_pictures = math.log(max(1, len(references)))

    def vectors(counts: Counter) -> tuple[list[dict], list[float], int]:
        """Per n the tf-idf vector, per n its norm, and the length in bigrams."""
        parts: list[dict] = [{} for _ in range(LONGEST)]
        for gram, count in counts.items():
            parts[len(gram) - 1][gram] = count * (log_pictures - math.log(max(1, frequency[gram])))
        length = sum(count for gram, count in counts.items() if len(gram) == 2)
        return parts, [math.sqrt(sum(v * v for v in part.values())) for part in parts], length

    scores = []
    for candidate, captions in zip(candidates, counted, strict=True):
        tfidf, norms, length = vectors(ngrams(tokenize(candidate)))
        total = 0.0
        for counts in captions:
            other_tfidf, other_norms, other_length = vectors(counts)
            similar_length = math.exp(-((length - other_length) ** 2) / (2 * SIGMA**2))
            for n in range(LONGEST):
                other = other_tfidf[n]
                dot = sum(min(v, other.get(g, 0.0)) * other.get(g, 0.0) for g, v in tfidf[n].items())
                norm = norms[n] * other_norms[n]
                total += similar_length * (dot / norm if norm else 0.0)
        scores.append(10 * total / LONGEST / len(captions))
    return np.asarray(scores)


class Cider(CountMetric):
    """`cider`: CIDEr-D (arXiv 1411.5726) as papers print it (times 100), the mean over the pictures.

    `predictions` are captions, `references` lists of human captions.

    Document frequencies are those of the pictures that were evaluated, so a
    run with `--limit` has other figures than the whole set, and the bootstrap keeps them fixed. Equal to `pycocoevalcap`
    on equal tokens; the tokenizer is a short one of ours, not the Java PTBTokenizer.
    """

    columns = ("score", "captions")
    statistics = statistics_of(columns, cider=lambda t: ratio(t.score, t.captions))
    not_fractions = frozenset({"cider"})
    reference_fields = datasets.Features(captions=TEXTS)

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._last: tuple[tuple, np.ndarray] | None = None

    def check(self, reference: Sequence[str]) -> None:
        if (
            isinstance(reference, str)
            or not reference
            or not all(isinstance(caption, str) and tokenize(caption) for caption in reference)
        ):
            raise UserError(f"expected a list of captions with words in them, found {short(reference)}.")

    def per_sample(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        scores = self.scores(predictions, references)
        return np.c_[scores[:, 0], np.ones(len(scores))]

    def scores(self, captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """`slow_scores`; those of the last texts are kept: figures, tables and examples of a report all ask for them."""
        if len(captions) != len(references):
            raise ValueError(f"{len(captions)} predictions but {len(references)} references")
        texts = tuple(captions), tuple(map(tuple, references))
        if self._last is None or self._last[0] != texts:
            self._last = texts, self.slow_scores(captions, references)
        return self._last[1]

    def slow_scores(self, captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """What takes seconds to compute of every caption, `(n, k)`, CIDEr first."""
        return 100 * cider_scores(captions, references)[:, None]

    def sample_counts(self, prediction: str, reference: Sequence[str]) -> tuple[float, ...]:
        raise NotImplementedError("CIDEr weighs n-grams by all pictures of a run: use `counts`")

    def badness(self, counts: np.ndarray) -> tuple[float, ...]:
        return (-float(counts[0]),)

    def verdict(self, counts: np.ndarray) -> str:
        return f"{counts[0]:.0f}"

    def truth_text(self, reference: Sequence[str]) -> str:
        return " / ".join(reference)


class Reg(Cider):
    """Referring expression generation by CIDEr-D (arXiv 1411.5726): region descriptions against what people said.

    `cider` as `Cider`; `leak_rate`: descriptions that spell coordinates; `words` of a description; `meteor` if asked for.

    `predictions` are `{"text", "leak"}`, `references` `{"captions", "image"}`. The unit of the bootstrap is the image.

    Args:
        meteor: METEOR 1.5 (Denkowski and Lavie, 2014) times 100, by `pycocoevalcap`, which runs its authors' Java program:
            the mean of the regions' own scores. The program's score of a corpus weighs regions by their length and
            differs a little.
    """

    columns = ("score", "captions", "leaks", "words")
    statistics = Cider.statistics | statistics_of(
        columns,
        leak_rate=lambda t: ratio(t.leaks, t.captions),
        words=lambda t: ratio(t.words, t.captions),
    )
    lower_is_better = frozenset({"leak_rate"})
    not_fractions = frozenset({"cider", "meteor", "words"})
    reference_fields = datasets.Features(captions=TEXTS, image=TEXT)
    prediction_feature = datasets.Features(text=TEXT, leak=datasets.Value("bool"))

    def __init__(self, meteor: bool = False, **kwargs):
        super().__init__(**kwargs)
        self._meteor = _load_meteor() if meteor else None
        if meteor:
            self.columns = (*type(self).columns, "meteor")
            self.statistics = type(self).statistics | statistics_of(
                self.columns, meteor=lambda t: ratio(t.meteor, t.captions)
            )

    def prediction_of(self, sample: Mapping) -> dict:
        return {"text": sample["answer"], "leak": sample["leak"]}

    def check(self, reference: Mapping) -> None:
        super().check(reference["captions"])

    def slow_scores(self, captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        cider = super().slow_scores(captions, references)
        if self._meteor is None:
            return cider
        candidates = {i: [" ".join(tokenize(text))] for i, text in enumerate(captions)}
        truth = {i: [" ".join(tokenize(text)) for text in texts] for i, texts in enumerate(references)}
        return np.c_[cider, 100 * np.asarray(self._meteor.compute_score(truth, candidates)[1])]

    def per_sample(self, predictions: Sequence[Mapping], references: Sequence[Mapping]) -> np.ndarray:
        texts = [prediction["text"] for prediction in predictions]
        scores = self.scores(texts, [reference["captions"] for reference in references])
        leaks = [float(prediction["leak"]) for prediction in predictions]
        words = [float(len(text.split())) for text in texts]
        return np.c_[scores[:, 0], np.ones(len(texts)), leaks, words, scores[:, 1:]]

    def group_of(self, reference: Mapping) -> str:
        return reference["image"]

    def truth_text(self, reference: Mapping) -> str:
        return super().truth_text(reference["captions"])


def _load_meteor():
    try:
        from pycocoevalcap.meteor.meteor import Meteor

        return Meteor()
    except ImportError as error:
        raise UserError("METEOR needs pycocoevalcap: pip install 'vlm-sft-rl[reg]'.") from error
    except FileNotFoundError as error:
        raise UserError("METEOR is a Java program, and `java` is not on this machine. Install it.") from error
