"""Boxes that were located: referring expression comprehension (REC), and self-consistency (SC-Tune, arXiv 2403.13263)."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np

from ...errors import UserError
from ...rewards.regions import iou
from ..bootstrap import Statistic, ratio
from .counting import CountMetric

HIT = 0.5
_BOX = datasets.Sequence(datasets.Value("float64"))


def per(numerator: str, denominator: str, columns: Sequence[str]) -> Statistic:
    """The ratio of two summed columns."""
    top, bottom = columns.index(numerator), columns.index(denominator)
    return lambda totals: ratio(totals[..., top], totals[..., bottom])


class RegionMetric(CountMetric):
    """Base of metrics about boxes: boxes of one image are not independent, so whole images are the bootstrap's units."""

    reference_fields = ("box", "image")
    reference_feature = {"box": _BOX, "image": datasets.Value("string")}  # noqa: RUF012

    def check(self, reference) -> None:
        box = reference["box"]
        numbers = isinstance(box, list) and all(isinstance(v, int | float) for v in box)
        if not numbers or len(box) != 4 or not (box[0] < box[2] and box[1] < box[3]):
            raise UserError(f"expected a `box` [x0, y0, x1, y1] with an area, found {box!r:.80}.")

    def group_of(self, reference):
        return reference["image"]

    def group_counts(self, rows: np.ndarray, references) -> np.ndarray:
        return rows.sum(axis=0)

    def truth_text(self, reference) -> str:
        return "[" + ", ".join(f"{value:.5g}" for value in reference["box"]) + "]"


class Rec(RegionMetric):
    """Referring expression comprehension: `acc50`, boxes with IoU of at least 0.5 with the truth (the rule of RefCOCO's
    tables); `mean_iou`; `parse_rate`: answers that hold a box at all.

    An answer without a box has an IoU of 0. `predictions` are boxes or None, in the pixels of `references`, which are
    `{"box", "image"}`; a box is (x0, y0, x1, y1). IoU is continuous, without the extra pixel of integer boxes.

    Raises:
        UserError: a true box without an area.
    """

    columns = ("hits", "overlap", "parsed", "boxes")
    statistics = {  # noqa: RUF012
        "acc50": per("hits", "boxes", columns),
        "mean_iou": per("overlap", "boxes", columns),
        "parse_rate": per("parsed", "boxes", columns),
    }
    prediction_field = "located"
    prediction_feature = _BOX

    def prediction_of(self, sample: Mapping[str, Any]) -> list[float] | None:
        return sample["located"]

    def sample_counts(self, prediction, reference) -> tuple[float, ...]:
        overlap = iou(prediction, reference["box"])
        return overlap >= HIT, overlap, prediction is not None, 1

    def badness(self, counts: np.ndarray) -> tuple[float, ...]:
        return (-float(counts[1]),)

    def verdict(self, counts: np.ndarray) -> str:
        return "right" if counts[0] else "wrong" if counts[2] else "unreadable"


class SelfConsistency(RegionMetric):
    """Describe a box, locate the description (SC-Tune, arXiv 2403.13263): `mean_iou` and `acc50` of the two boxes, and
    `parse_rate`.

    `leak_rate`: descriptions that spell coordinates (the loop then closes with nothing described); `words` of a
    description. `predictions` are `{"text", "located", "leak"}`, `references` as those of `Rec`.

    Raises:
        UserError: a true box without an area.
    """

    columns = ("hits", "overlap", "parsed", "boxes", "leaks", "words")
    statistics = {  # noqa: RUF012
        **{name: Rec.statistics[name] for name in ("mean_iou", "acc50", "parse_rate")},
        "leak_rate": per("leaks", "boxes", columns),
        "words": per("words", "boxes", columns),
    }
    lower_is_better = frozenset({"leak_rate"})
    not_fractions = frozenset({"words"})
    prediction_field = "located"
    prediction_feature = {  # noqa: RUF012
        "text": datasets.Value("string"),
        "located": _BOX,
        "leak": datasets.Value("bool"),
    }

    def prediction_of(self, sample: Mapping[str, Any]) -> dict:
        return {"text": sample["answer"], "located": sample["located"], "leak": sample["leak"]}

    def sample_counts(self, prediction, reference) -> tuple[float, ...]:
        overlap, found = iou(prediction["located"], reference["box"]), prediction["located"] is not None
        return overlap >= HIT, overlap, found, 1, prediction["leak"], len(prediction["text"].split())

    badness, verdict = Rec.badness, Rec.verdict
