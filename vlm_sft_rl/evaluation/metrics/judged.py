"""Benchmarks that a language model judges: what its replies mean. The replies are the `predictions` here.

`reference_fields` are what the judge's prompt may name (see `evaluation.judge`). A reply that cannot be read, and an
answer that no reply came for, is left out of the scores and shown as `unjudged`; nothing is dropped in silence.
"""

import json
import re
from collections.abc import Mapping

import datasets
import numpy as np

from ...data.conclusions import without_thinking
from ...errors import UserError, short
from ...graders.grade import check_rules
from ..bootstrap import ratio, statistics_of
from .counting import TEXT, TEXTS, CountMetric

COLUMNS = ("score", "passed", "judged", "unjudged")
_NUMBER = r"(\d+(?:\.\d+)?|\.\d+)"


def _mean(t) -> np.ndarray:
    return ratio(t.score, t.judged)


def _failed(t) -> np.ndarray:
    return ratio(t.judged - t.passed, t.judged)


def _unjudged(t) -> np.ndarray:
    return ratio(t.unjudged, t.judged + t.unjudged)


def _last_number(pattern: str, reply: str, largest: float) -> float | None:
    """The last number behind the pattern's words; None without one, or beyond `largest`."""
    numbers = re.findall(rf"{pattern}\W{{1,5}}{_NUMBER}", reply, re.IGNORECASE)
    return float(numbers[-1]) if numbers and float(numbers[-1]) <= largest else None


class JudgedMetric(CountMetric):
    """Base: `read` turns a reply into a score, or None."""

    columns = COLUMNS
    prediction_field = "judgement"
    lower_is_better = frozenset({"unjudged", "hallucination_rate"})
    reference_fields = datasets.Features(answer=TEXT)
    passing = 0.5  # a score of at least this counts as passed

    def read(self, reply: str) -> float | None:
        raise NotImplementedError

    def check(self, reference: str | list | Mapping) -> None:
        values = (
            reference if isinstance(reference, Mapping) else dict.fromkeys(self.reference_fields, reference)
        )
        for name, value in values.items():
            texts = value if isinstance(value, list) else [value]
            if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
                raise UserError(f"field {name!r}: expected text that is not empty, found {short(value)}.")

    def sample_counts(self, prediction: str, reference: str | list | Mapping) -> tuple[float, ...]:
        reply = without_thinking(prediction)
        score = self.read(reply) if reply.strip() else None
        return (0.0, 0, 0, 1) if score is None else (score, int(score >= self.passing), 1, 0)

    def badness(self, counts: np.ndarray) -> tuple[float, ...]:
        return (-float(counts[0]), float(counts[3]))

    def verdict(self, counts: np.ndarray) -> str:
        return "unjudged" if counts[3] else f"{counts[0]:g}"


class MMHal(JudgedMetric):
    """MMHal-Bench (arXiv 2309.14525): `score` from 0 to 6 and `hallucination_rate`, the share below 3.

    Args:
        rules: `"released"` looks for "rating: s" anywhere in the lower-cased reply and gives 0 where there is none, or
            more than one (that code asks until there is a reply, so no reply is `unjudged` here as well). Ours: the last
            line "Rating: s" counts, and a reply without one is `unjudged`.
    """

    statistics = statistics_of(COLUMNS, score=_mean, hallucination_rate=_failed, unjudged=_unjudged)
    not_fractions = frozenset({"score"})
    reference_fields = datasets.Features(answer=TEXT, image_content=TEXTS)
    passing = 3.0

    def __init__(self, rules: str = "ours", **kwargs):
        super().__init__(**kwargs)
        self.rules = check_rules(rules, "metric_options")

    def read(self, reply: str) -> float | None:
        if self.rules == "released":
            scores = [score for score in range(7) if f"rating: {score}" in reply.lower()]
            return float(scores[0]) if len(scores) == 1 else 0.0
        ratings = re.findall(r"rating\W{0,6}([0-6])(?![\d.])", reply, re.IGNORECASE)
        return float(ratings[-1]) if ratings else None


class HaloQuest(JudgedMetric):
    """HaloQuest (arXiv 2407.15680): `accuracy`, the share of answers that the judge finds right.

    The judge ends with "Correct: yes" or "Correct: no". The released evaluator hands the judge the whole record with all
    rejected phrases; here it sees the answer alone.
    """

    statistics = statistics_of(COLUMNS, accuracy=_mean, unjudged=_unjudged)

    def read(self, reply: str) -> float | None:
        verdicts = re.findall(r"correct\W{0,6}(yes|no|true|false)\b", reply, re.IGNORECASE)
        return float(verdicts[-1].lower() in ("yes", "true")) if verdicts else None

    def verdict(self, counts: np.ndarray) -> str:
        return "unjudged" if counts[3] else "right" if counts[0] else "wrong"


class Clair(JudgedMetric):
    """CLAIR (arXiv 2310.12971): how likely two sets of captions are about one picture, `clair` from 0 to 1.

    The judge answers with JSON, `{"score": 0 to 100, "reason": …}`; `references` are lists of human captions.
    """

    statistics = statistics_of(COLUMNS, clair=_mean, unjudged=_unjudged)
    reference_fields = datasets.Features(captions=TEXTS)

    def read(self, reply: str) -> float | None:
        for match in re.finditer(r"\{[^{}]*\}", reply):
            try:
                value = json.loads(match.group()).get("score")
            except (ValueError, RecursionError):
                continue
            if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 100:
                return value / 100
        score = _last_number("score", reply, 100)
        return None if score is None else score / 100

    def truth_text(self, reference: str | list) -> str:
        return reference if isinstance(reference, str) else " / ".join(reference)


class MMVet(JudgedMetric):
    """MM-Vet (arXiv 2308.02490): `score`, the mean correctness of free answers, each 0.0 to 1.0 by the judge.

    `<AND>` in a gold answer asks for all parts, `<OR>` for one. The judge ends with "Correctness: 0.7"; a reply that is a
    number alone is read, too.
    """

    statistics = statistics_of(COLUMNS, score=_mean, unjudged=_unjudged)

    def read(self, reply: str) -> float | None:
        bare = reply.strip().rstrip(".")
        if re.fullmatch(_NUMBER, bare):
            return float(bare) if float(bare) <= 1 else None
        return _last_number("correctness", reply, 1)
