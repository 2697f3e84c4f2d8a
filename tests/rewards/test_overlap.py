import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl.rewards.regions import area, giou, iou

SIDE = 12
boxes = st.tuples(*[st.integers(0, SIDE)] * 4)
proper = st.tuples(
    st.integers(0, SIDE - 1), st.integers(0, SIDE - 1), st.integers(1, 6), st.integers(1, 6)
).map(lambda t: (t[0], t[1], t[0] + t[2], t[1] + t[3]))


def pixels(box) -> set[tuple[int, int]]:
    return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}


@given(boxes, boxes)
def test_iou_counts_pixels(one, other):
    a, b = pixels(one), pixels(other)
    wanted = len(a & b) / len(a | b) if a and b else 0.0
    assert iou(one, other) == pytest.approx(wanted)
    assert area(one) == len(a)


@given(proper, proper)
def test_giou_is_iou_minus_the_empty_part_of_the_hull(one, other):
    a, b = pixels(one), pixels(other)
    hull = pixels(
        (min(one[0], other[0]), min(one[1], other[1]), max(one[2], other[2]), max(one[3], other[3]))
    )
    wanted = len(a & b) / len(a | b) - (len(hull) - len(a | b)) / len(hull)
    assert giou(one, other) == pytest.approx(wanted)
    assert -1 <= giou(one, other) <= iou(one, other) <= 1
    assert giou(one, one) == iou(one, one) == 1


@given(proper, proper, st.floats(0.1, 50), st.floats(-20, 20))
def test_neither_depends_on_unit_or_origin(one, other, scale, shift):
    def moved(box):
        return [v * scale + shift for v in box]

    assert iou(moved(one), moved(other)) == pytest.approx(iou(one, other), abs=1e-6)
    assert giou(moved(one), moved(other)) == pytest.approx(giou(one, other), abs=1e-6)


def test_hand_worked():
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert giou((0, 0, 1, 1), (2, 0, 3, 1)) == pytest.approx(-1 / 3)
    assert giou((0, 0, 1, 1), (9, 0, 10, 1)) < giou((0, 0, 1, 1), (2, 0, 3, 1))
    assert iou(None, (0, 0, 1, 1)) == 0 and giou(None, (0, 0, 1, 1)) == -1
