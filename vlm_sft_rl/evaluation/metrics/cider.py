"""CIDEr-D (arXiv 1411.5726): agreement of a caption's n-grams with those of several human captions."""

import math
import re
from collections import Counter
from collections.abc import Sequence

import datasets
import numpy as np

from ...errors import UserError
from ..bootstrap import ratio
from .counting import CountMetric

COLUMNS = ("score", "captions")
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

    Raises:
        UserError: a picture without references.
    """
    for index, captions in enumerate(references):
        if not captions:
            raise UserError(f"picture {index}: no reference caption.")
    cooked = [[ngrams(tokenize(caption)) for caption in captions] for captions in references]
    frequency = Counter(gram for captions in cooked for gram in {g for counts in captions for g in counts})
    log_pictures = math.log(max(1, len(references)))

    def vectors(counts: Counter) -> tuple[list[dict], list[float], int]:
        parts: list[dict] = [{} for _ in range(LONGEST)]
        for gram, count in counts.items():
            parts[len(gram) - 1][gram] = count * (log_pictures - math.log(max(1, frequency[gram])))
        length = sum(count for gram, count in counts.items() if len(gram) == 2)
        return parts, [math.sqrt(sum(v * v for v in part.values())) for part in parts], length

    scores = []
    for candidate, captions in zip(candidates, cooked, strict=True):
        own, own_norm, own_length = vectors(ngrams(tokenize(candidate)))
        total = 0.0
        for counts in captions:
            other, other_norm, other_length = vectors(counts)
            close = math.exp(-((own_length - other_length) ** 2) / (2 * SIGMA**2))
            for n in range(LONGEST):
                dot = sum(min(v, other[n].get(g, 0.0)) * other[n].get(g, 0.0) for g, v in own[n].items())
                norm = own_norm[n] * other_norm[n]
                total += close * (dot / norm if norm else 0.0)
        scores.append(10 * total / LONGEST / len(captions))
    return np.asarray(scores)


def mean_score(totals: np.ndarray) -> np.ndarray:
    return ratio(totals[..., 0], totals[..., 1])


class Cider(CountMetric):
    """`cider`: CIDEr-D (arXiv 1411.5726) as papers print it (times 100), the mean over the pictures.

    `predictions` are captions, `references` lists of human captions.

    Document frequencies are those of the pictures that were evaluated, so a
    run with `--limit` has other figures than the whole set, and the bootstrap keeps them fixed. An implementation of our
    own: equal to `pycocoevalcap` on equal tokens; the tokenizer is a short one of ours, not the Java PTBTokenizer.

    Raises:
        UserError: a picture without a human caption.
    """

    columns = COLUMNS
    statistics = {"cider": mean_score}  # noqa: RUF012
    not_fractions = frozenset({"cider"})
    reference_fields = ("captions",)
    reference_feature = datasets.Sequence(datasets.Value("string"))

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._last: tuple[tuple, np.ndarray] | None = None

    def check(self, reference) -> None:
        if (
            isinstance(reference, str)
            or not reference
            or not all(isinstance(caption, str) and tokenize(caption) for caption in reference)
        ):
            raise UserError(f"expected a list of captions with words in them, found {reference!r:.80}.")

    def per_sample(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions but {len(references)} references")
        asked = tuple(predictions), tuple(map(tuple, references))
        if self._last is None or self._last[0] != asked:
            # figures, tables and examples of a report all ask for the same; once takes seconds
            self._last = asked, self.scores(predictions, references)
        scores = self._last[1]
        return np.c_[scores[:, 0], np.ones(len(scores)), scores[:, 1:]]

    def scores(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """What is slow to compute of every answer, `(n, k)`, CIDEr first."""
        return 100 * cider_scores(predictions, references)[:, None]

    def sample_counts(self, prediction: str, reference: Sequence[str]) -> tuple[float, ...]:
        raise NotImplementedError("CIDEr weighs n-grams by all pictures of a run: use `counts`")

    def badness(self, counts: np.ndarray) -> tuple[float, ...]:
        return (-float(counts[0]),)

    def verdict(self, counts: np.ndarray) -> str:
        return f"{counts[0]:.0f}"

    def truth_text(self, reference: Sequence[str]) -> str:
        return " / ".join(reference)
