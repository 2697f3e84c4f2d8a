"""The area under the ROC curve. Pure numpy: training logs it, evaluation reports it."""

from collections.abc import Sequence

import numpy as np


def score_arrays(scores: Sequence[float], positive: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    """Both as vectors of one length.

    Raises:
        ValueError: the shapes differ, or a score is NaN.
    """
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

    Raises:
        ValueError: see `score_arrays`.
    """
    scores, positive = score_arrays(scores, positive)
    negatives, positives = np.sort(scores[~positive]), scores[positive]
    if not len(negatives) or not len(positives):
        return float("nan")
    below = np.searchsorted(negatives, positives, side="left")
    not_above = np.searchsorted(negatives, positives, side="right")
    # integers until the last step: exact for any number of ties
    return float(below.sum() + not_above.sum()) / (2 * len(negatives) * len(positives))
