"""How well a score ranks positives above negatives: ROC curve and the area under it. Pure numpy.

Training logs the area for P(</UN>) on right and wrong phrases, evaluation reports it and draws the curve.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Roc(NamedTuple):
    """Points of a ROC curve, from (0, 0) to (1, 1); `thresholds[i]` rejects every score >= it."""

    false_rejects: np.ndarray
    true_rejects: np.ndarray
    thresholds: np.ndarray


def _arrays(scores: Sequence[float], positive: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    """Both as vectors. Raises ValueError: the shapes differ, or a score is NaN."""
    scores, positive = np.asarray(scores, dtype=float), np.asarray(positive, dtype=bool)
    if scores.shape != positive.shape or scores.ndim != 1:
        raise ValueError(
            f"expected two vectors of one length, got shapes {scores.shape} and {positive.shape}"
        )
    if np.isnan(scores).any():
        raise ValueError("a score is NaN")
    return scores, positive


def roc_auc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """The chance that a positive scores above a negative, ties counted as a half; NaN where a class is empty.

    0.5 is a verifier that knows nothing.

    Raises:
        ValueError: the vectors differ in length, or a score is NaN.
    """
    scores, positive = _arrays(scores, positive)
    negatives, positives = np.sort(scores[~positive]), scores[positive]
    if not len(negatives) or not len(positives):
        return float("nan")
    below = np.searchsorted(negatives, positives, side="left")
    not_above = np.searchsorted(negatives, positives, side="right")
    # integers until the last step: exact for any number of ties
    return float(below.sum() + not_above.sum()) / (2 * len(negatives) * len(positives))


def roc_curve(p_unconfident: Sequence[float], is_wrong: Sequence[bool]) -> Roc:
    """One point per distinct score, so that tied scores make one diagonal step.

    Raises:
        ValueError: one of the classes is empty, or as `roc_auc`.
    """
    scores, wrong = _arrays(p_unconfident, is_wrong)
    if wrong.all() or not wrong.any():
        raise ValueError("a ROC curve needs right and wrong phrases")
    order = np.argsort(-scores, kind="stable")
    scores, wrong = scores[order], wrong[order]
    last_of_tie = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
    rejected_wrong = np.cumsum(wrong)[last_of_tie]
    rejected_right = last_of_tie + 1 - rejected_wrong
    return Roc(
        np.append(0.0, rejected_right / (~wrong).sum()),
        np.append(0.0, rejected_wrong / wrong.sum()),
        np.append(np.inf, scores[last_of_tie]),
    )
