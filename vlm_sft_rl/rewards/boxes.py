"""Overlap of two boxes (x1, y1, x2, y2), in any one unit."""

from collections.abc import Sequence

Box = Sequence[float]


def area(box: Box) -> float:
    """Area; 0 for a box that is empty or inside out."""
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def intersection(one: Box, other: Box) -> float:
    if not area(one) or not area(other):
        return 0.0
    return area((max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3])))


def iou(one: Box | None, other: Box | None) -> float:
    """Intersection over union in [0, 1]; 0 where a box is missing (unparsed) or empty."""
    if one is None or other is None:
        return 0.0
    common = intersection(one, other)
    return common / (area(one) + area(other) - common) if common else 0.0


def giou(one: Box | None, other: Box | None) -> float:
    """Generalised IoU in [-1, 1] (Rezatofighi et al., CVPR 2019): IoU minus the empty share of the enclosing box.

    Tells a near miss from a far one, where IoU is 0 for both. A missing or empty box counts as the farthest miss, -1.
    """
    if one is None or other is None or not area(one) or not area(other):
        return -1.0
    common = intersection(one, other)
    union = area(one) + area(other) - common
    hull = area((min(one[0], other[0]), min(one[1], other[1]), max(one[2], other[2]), max(one[3], other[3])))
    return common / union - (hull - union) / hull
