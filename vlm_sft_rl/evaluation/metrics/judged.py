"""Benchmarks that a language model judges: what its replies mean. The replies are the `predictions` here.

`reference_fields` are what the judge's prompt may name (see `evaluation.judging`). A reply that cannot be read, and an
answer that no reply came for, is left out of the scores and shown as `unjudged`; nothing is dropped in silence.
"""

import json
import re

import datasets
import numpy as np

from ...errors import UserError
from ..bootstrap import ratio
from .counting import CountMetric
from .yes_no import RULES

COLUMNS = ("score", "passed", "judged", "unjudged")
_NUMBER = r"(\d+(?:\.\d+)?|\.\d+)"


def mean_score(totals: np.ndarray) -> np.ndarray:
    return ratio(totals[..., 0], totals[..., 2])


def failed_share(totals: np.ndarray) -> np.ndarray:
    return ratio(totals[..., 2] - totals[..., 1], totals[..., 2])


def unjudged_share(totals: np.ndarray) -> np.ndarray:
    return ratio(totals[..., 3], totals[..., 2] + totals[..., 3])


class JudgedMetric(CountMetric):
    """Base: `read` turns a reply into a score, or None."""

    columns = COLUMNS
    prediction_field = "judgement"
    lower_is_better = frozenset({"unjudged", "hallucination_rate"})
    reference_feature = datasets.Value("string")
    passing = 0.5  # a score of at least this counts as passed

    def read(self, reply: str) -> float | None:
        raise NotImplementedError

    def check(self, reference) -> None:
        values = reference if isinstance(reference, dict) else {self.reference_fields[0]: reference}
        for name in self.reference_fields:
            value = values[name]
            texts = value if isinstance(value, list) else [value]
            if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
                raise UserError(f"field {name!r}: expected text that is not empty, found {value!r:.80}.")

    def sample_counts(self, prediction: str, reference) -> tuple[float, ...]:
        score = self.read(prediction) if prediction.strip() else None
        if score is None:
            return (0.0, 0, 0, 1)
        return (score, int(score >= self.passing), 1, 0)

    def badness(self, counts: np.ndarray) -> tuple[float, ...]:
        return (-float(counts[0]), float(counts[3]))

    def verdict(self, counts: np.ndarray) -> str:
        return "unjudged" if counts[3] else f"{counts[0]:g}"

    def truth_text(self, reference) -> str:
        value = reference if not isinstance(reference, dict) else reference.get("answer", "")
        return value if isinstance(value, str) else " / ".join(value)


class MMHal(JudgedMetric):
    """MMHal-Bench (arXiv 2309.14525): `score` from 0 to 6 and `hallucination_rate`, the share below 3.

    Args:
        rules: `"released"` looks for "rating: s" anywhere in the lower-cased reply and gives 0 where there is none, or
            more than one. Strict: the last line "Rating: s" counts, and a reply without one is `unjudged`.
    """

    statistics = {  # noqa: RUF012
        "score": mean_score,
        "hallucination_rate": failed_share,
        "unjudged": unjudged_share,
    }
    not_fractions = frozenset({"score"})
    reference_fields = ("answer", "image_content")
    reference_feature = {  # noqa: RUF012
        "answer": datasets.Value("string"),
        "image_content": datasets.Sequence(datasets.Value("string")),
    }
    passing = 3.0

    def __init__(self, rules: str = "ours", **kwargs):
        super().__init__(**kwargs)
        if rules not in RULES:
            raise UserError(f"mmhal: rules is {rules!r}, expected one of {', '.join(RULES)}.")
        self.rules = rules

    def read(self, reply: str) -> float | None:
        if self.rules == "released":
            said = [score for score in range(7) if f"rating: {score}" in reply.lower()]
            return float(said[0]) if len(said) == 1 else 0.0
        said = re.findall(r"rating\W{0,6}([0-6])(?![\d.])", reply, re.IGNORECASE)
        return float(said[-1]) if said else None

    def sample_counts(self, prediction: str, reference) -> tuple[float, ...]:
        if self.rules == "released" and not prediction.strip():
            return (0.0, 0, 0, 1)  # no reply at all: the released code asks until there is one
        return super().sample_counts(prediction, reference)


class HaloQuest(JudgedMetric):
    """HaloQuest (arXiv 2407.15680): `accuracy`, the share of answers that the judge finds right.

    The judge ends with "Correct: yes" or "Correct: no". The released evaluator hands the judge the whole record with all
    rejected phrases; here, and in both modes of this class, it sees the answer alone.
    """

    statistics = {"accuracy": mean_score, "unjudged": unjudged_share}  # noqa: RUF012
    reference_fields = ("answer",)

    def read(self, reply: str) -> float | None:
        said = re.findall(r"correct\W{0,6}(yes|no|true|false)\b", reply, re.IGNORECASE)
        return float(said[-1].lower() in ("yes", "true")) if said else None

    def verdict(self, counts: np.ndarray) -> str:
        return "unjudged" if counts[3] else "right" if counts[0] else "wrong"


class Clair(JudgedMetric):
    """CLAIR (arXiv 2310.12971): how likely two sets of captions are about one picture, `clair` from 0 to 1.

    The judge answers with JSON, `{"score": 0 to 100, "reason": …}`; `references` are lists of human captions.
    """

    statistics = {"clair": mean_score, "unjudged": unjudged_share}  # noqa: RUF012
    reference_fields = ("captions",)
    reference_feature = datasets.Sequence(datasets.Value("string"))

    def read(self, reply: str) -> float | None:
        for match in re.finditer(r"\{.*?\}", reply, re.DOTALL):
            try:
                value = json.loads(match.group()).get("score")
            except (json.JSONDecodeError, AttributeError):
                continue
            if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 100:
                return value / 100
        said = re.findall(rf"score\W{{1,5}}{_NUMBER}", reply, re.IGNORECASE)
        value = float(said[-1]) if said else None
        return value / 100 if value is not None and value <= 100 else None


class MMVet(JudgedMetric):
    """MM-Vet (arXiv 2308.02490): `score`, the mean correctness of free answers, each 0.0 to 1.0 by the judge.

    `<AND>` in a gold answer asks for all parts, `<OR>` for one. The judge ends with "Correctness: 0.7"; a reply that is a
    number alone is read, too.
    """

    statistics = {"score": mean_score, "unjudged": unjudged_share}  # noqa: RUF012
    reference_fields = ("answer",)

    def read(self, reply: str) -> float | None:
        said = re.findall(rf"correctness\W{{1,5}}{_NUMBER}", reply, re.IGNORECASE)
        if not said and re.fullmatch(_NUMBER, reply.strip().rstrip(".")):
            said = [reply.strip().rstrip(".")]
        value = float(said[-1]) if said else None
        return value if value is not None and value <= 1 else None
