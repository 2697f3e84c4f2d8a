"""How well P(</UN>) ranks a model's wrong phrases above its right ones. Pure numpy."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ...roc import roc_auc, score_arrays


def verifier_auc(p_unconfident: Sequence[float], is_wrong: Sequence[bool]) -> float:
    """Area under the ROC curve: the chance that a wrong phrase scores above a right one, ties counted as a half.

    NaN where one of the two classes is empty. 0.5 is a verifier that knows nothing.
    """
    return roc_auc(p_unconfident, is_wrong)


class Roc(NamedTuple):
    """Points of a ROC curve, from (0, 0) to (1, 1); `thresholds[i]` rejects every score >= it."""

    false_rejects: np.ndarray
    true_rejects: np.ndarray
    thresholds: np.ndarray


def roc_curve(p_unconfident: Sequence[float], is_wrong: Sequence[bool]) -> Roc:
    """One point per distinct score, so that tied scores make one diagonal step.

    Raises:
        ValueError: one of the classes is empty.
    """
    scores, wrong = score_arrays(p_unconfident, is_wrong)
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


class RiskCoverage(NamedTuple):
    """At one threshold: the share of phrases kept, and the share of wrong ones among those (0 if none is kept)."""

    threshold: float
    coverage: float
    risk: float


def risk_coverage(
    p_unconfident: Sequence[float], is_wrong: Sequence[bool], thresholds: Sequence[float] | None = None
) -> list[RiskCoverage]:
    """What keeping only phrases with P(</UN>) <= threshold would cost and bring.

    Args:
        thresholds: default every distinct score.
    """
    scores, wrong = score_arrays(p_unconfident, is_wrong)
    order = np.argsort(scores, kind="stable")
    scores, errors = scores[order], np.append(0, np.cumsum(wrong[order]))
    taus = np.unique(scores) if thresholds is None else np.asarray(thresholds, dtype=float)
    kept = np.searchsorted(scores, taus, side="right")
    n = max(1, len(scores))
    return [
        RiskCoverage(float(tau), float(k / n), float(errors[k] / k) if k else 0.0)
        for tau, k in zip(taus, kept, strict=True)
    ]
