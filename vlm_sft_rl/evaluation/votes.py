"""A vote over candidates: how much each one counts, what is chosen, and what the first k of them are worth."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..decoding.tried import weights
from ..errors import UserError
from ..graders.grade import majority_index
from .metrics.counting import CountMetric
from .revisions import scored
from .scoring import count_matrix, to_json


@dataclass(frozen=True)
class Candidates:
    """The answers that a sample was chosen from.

    Attributes:
        texts: as decoded; answers: what is scored of each; keys: what is read of each, None where nothing can be.
        probabilities: of each as a first draw, where they were drawn without replacement.
    """

    texts: list[str]
    answers: list[str]
    keys: list[str | None]
    probabilities: list[float] | None

    def vote(self, k: int | None = None) -> int | None:
        """The first of those with the most frequent answer among the first `k`; None where none is readable."""
        shares = None if self.probabilities is None else weights(self.probabilities[:k])
        return majority_index(self.keys[:k], shares)


def candidates(sample: dict, metric: CountMetric) -> Candidates:
    """Those in a sample's trace. Raises UserError: there are none, or their probabilities are not as many."""
    event = next((event for event in sample["trace"] if event.get("kind") == "candidates"), {"texts": []})
    texts, probabilities = event["texts"], event.get("probabilities")
    problem = ""
    if not texts:
        problem = "no candidates in its trace"
    elif probabilities is not None and len(probabilities) != len(texts):
        problem = f"{len(probabilities)} probabilities of {len(texts)} candidates"
    if problem:
        raise UserError(
            f"sample {sample['id']!r}: {problem}, so it is not as `--decoder majority` writes it. Run the evaluation again "
            "into another folder."
        )
    reference = metric.reference_of(sample["reference"])
    answers = [scored(text) for text in texts]
    return Candidates(texts, answers, [metric.read(answer, reference) for answer in answers], probabilities)


def vote(sample: dict, metric: CountMetric, *, keep_selected: bool = False) -> dict:
    """The sample with the first candidate that has the most frequent answer, and an event `vote` that says how.

    Args:
        keep_selected: the answer is the model's own selection: it stays where it is a candidate's answer, or where no
            candidate has a readable one. Otherwise the first candidate stands where none is readable.
    """
    drawn = candidates(sample, metric)
    index = drawn.vote()
    event: dict[str, Any] = {"kind": "vote", "keys": drawn.keys}
    if keep_selected:
        reference = metric.reference_of(sample["reference"])
        event["selected"] = selected = metric.read(sample["answer"], reference)
        if selected is not None and selected in drawn.keys:
            index = None
    elif index is None:
        index = 0
    event["chosen"] = index
    sample = {**sample, "trace": [*sample["trace"], event]}
    if index is None:
        return sample
    answer = drawn.answers[index]
    return {
        **sample,
        "answer": answer,
        "tagged_answer": drawn.texts[index],
        "accepted_answer": answer,
        "best_effort_answer": answer,
    }


def by_count(samples: Sequence[dict], metric: CountMetric, rounds: int = 100, seed: int = 0) -> list[dict]:
    """What the first k candidates are worth, for every k.

    Returns:
        maps with `k`, `vote` and `best` (the metric with intervals of what they vote for, and of the best of them: pass@k),
        `texts` and `answers` (how many different ones they have, on average).
    """
    drawn = [candidates(sample, metric) for sample in samples]
    orders = []  # of each sample, the number of the best candidate so far
    for sample, each in zip(samples, drawn, strict=True):
        truths = [metric.reference_of(sample["reference"])] * len(each.answers)
        badness = [metric.badness(counts) for counts in metric.per_sample(each.answers, truths)]
        orders.append([min(range(k + 1), key=badness.__getitem__) for k in range(len(badness))])
    figures = []
    for k in range(1, max(map(len, orders)) + 1):
        chosen = {
            "vote": [each.vote(k) or 0 for each in drawn],
            "best": [order[min(k, len(order)) - 1] for order in orders],
        }
        metrics = {}
        for name, places in chosen.items():
            answers = [
                {**sample, "answer": each.answers[place]}
                for sample, each, place in zip(samples, drawn, places, strict=True)
            ]
            metrics[name] = to_json(metric.intervals(count_matrix(answers, metric), rounds, seed))
        different = {
            "texts": float(np.mean([len(set(each.texts[:k])) for each in drawn])),
            "answers": float(np.mean([len({*each.keys[:k]} - {None}) for each in drawn])),
        }
        figures.append({"k": k, **metrics, **different})
    return figures
