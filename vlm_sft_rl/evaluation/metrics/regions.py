"""Boxes that were located: referring expression comprehension (REC), and self-consistency (SC-Tune, arXiv 2403.13263)."""

from collections.abc import Mapping, Sequence

import datasets
import numpy as np

from ...errors import UserError, short
from ...rewards.regions import iou
from ..bootstrap import ratio, statistics_of
from .counting import TEXT, CountMetric

HIT = 0.5
_BOX = datasets.Sequence(datasets.Value("float64"))


class Rec(CountMetric):
    """Referring expression comprehension: `acc50`, boxes with IoU of at least 0.5 with the truth (the rule of RefCOCO's
    tables); `mean_iou`; `parse_rate`: answers that hold a box at all.

    An answer without a box has an IoU of 0. `predictions` are boxes or None, in the pixels of `references`, which are
    `{"box", "image"}`; a box is (x0, y0, x1, y1). IoU is continuous, without the extra pixel of integer boxes. Boxes of
    one image are not independent, so whole images are the units of the bootstrap.
    """

    columns = ("hits", "overlap", "parsed", "boxes")
    statistics = statistics_of(
        columns,
        acc50=lambda t: ratio(t.hits, t.boxes),
        mean_iou=lambda t: ratio(t.overlap, t.boxes),
        parse_rate=lambda t: ratio(t.parsed, t.boxes),
    )
    reference_fields = datasets.Features(box=_BOX, image=TEXT)
    prediction_field = "located"
    prediction_feature = _BOX

    def prediction_of(self, sample: Mapping) -> list[float] | None:
        return sample["located"]

    def check(self, reference: Mapping) -> None:
        box = reference["box"]
        numbers = isinstance(box, list) and all(isinstance(v, int | float) for v in box)
        if not numbers or len(box) != 4 or not (box[0] < box[2] and box[1] < box[3]):
            raise UserError(f"expected a `box` [x0, y0, x1, y1] with an area, found {short(box)}.")

    def sample_counts(self, prediction: Sequence[float] | None, reference: Mapping) -> tuple[float, ...]:
        overlap = iou(prediction, reference["box"])
        return overlap >= HIT, overlap, prediction is not None, 1

    def group_of(self, reference: Mapping) -> str:
        return reference["image"]

    def badness(self, counts: np.ndarray) -> tuple[float, ...]:
        return (-float(counts[1]),)

    def verdict(self, counts: np.ndarray) -> str:
        return "right" if counts[0] else "wrong" if counts[2] else "unreadable"

    def truth_text(self, reference: Mapping) -> str:
        return "[" + ", ".join(f"{value:.5g}" for value in reference["box"]) + "]"


class RefAdv(Rec):
    """`Rec` with the stricter hits of Ref-Adv's tables (arXiv 2602.23898): `acc75`, `acc90` (IoU 0.75 and 0.9)."""

    columns = (*Rec.columns, "hits75", "hits90")
    statistics = statistics_of(
        columns,
        acc50=lambda t: ratio(t.hits, t.boxes),
        acc75=lambda t: ratio(t.hits75, t.boxes),
        acc90=lambda t: ratio(t.hits90, t.boxes),
        mean_iou=lambda t: ratio(t.overlap, t.boxes),
        parse_rate=lambda t: ratio(t.parsed, t.boxes),
    )

    def sample_counts(self, prediction: Sequence[float] | None, reference: Mapping) -> tuple[float, ...]:
        counts = super().sample_counts(prediction, reference)
        return *counts, counts[1] >= 0.75, counts[1] >= 0.9


class SelfConsistency(Rec):
    """Describe a box, locate the description (SC-Tune, arXiv 2403.13263): `mean_iou` and `acc50` of the two boxes, and
    `parse_rate`.

    `leak_rate`: descriptions that spell coordinates (the loop then closes with nothing described); `words` of a
    description. `predictions` are `{"text", "located", "leak"}`, `references` as those of `Rec`.
    """

    columns = (*Rec.columns, "leaks", "words")
    statistics = statistics_of(
        columns,
        mean_iou=lambda t: ratio(t.overlap, t.boxes),
        acc50=lambda t: ratio(t.hits, t.boxes),
        parse_rate=lambda t: ratio(t.parsed, t.boxes),
        leak_rate=lambda t: ratio(t.leaks, t.boxes),
        words=lambda t: ratio(t.words, t.boxes),
    )
    lower_is_better = frozenset({"leak_rate"})
    not_fractions = frozenset({"words"})
    prediction_feature = datasets.Features(text=TEXT, located=_BOX, leak=datasets.Value("bool"))

    def prediction_of(self, sample: Mapping) -> dict:
        return {"text": sample["answer"], "located": sample["located"], "leak": sample["leak"]}

    def sample_counts(self, prediction: Mapping, reference: Mapping) -> tuple[float, ...]:
        boxes = super().sample_counts(prediction["located"], reference)
        return *boxes, prediction["leak"], len(prediction["text"].split())
