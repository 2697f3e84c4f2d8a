"""Rewards of boxes: their overlap, the functions that a recipe names, and the guard against spelt coordinates."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.models.boxes import CONVENTIONS
from vlm_sft_rl.rewards.regions import (
    area,
    combine,
    giou,
    iou,
    iou_reward,
    length_reward,
    reward_named,
    spells_coordinates,
)

SIDE = 12
boxes = st.tuples(*[st.integers(0, SIDE)] * 4)
proper = st.tuples(
    st.integers(0, SIDE - 1), st.integers(0, SIDE - 1), st.integers(1, 6), st.integers(1, 6)
).map(lambda t: (t[0], t[1], t[0] + t[2], t[1] + t[3]))


def pixels(box) -> set[tuple[int, int]]:
    return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}


@given(boxes, boxes)
def test_iou_counts_pixels(a, b):
    in_a, in_b = pixels(a), pixels(b)
    expected = len(in_a & in_b) / len(in_a | in_b) if in_a and in_b else 0.0
    assert iou(a, b) == pytest.approx(expected)
    assert area(a) == len(in_a)


@given(proper, proper)
def test_giou_is_iou_minus_the_empty_part_of_the_hull(a, b):
    both, either = pixels(a) & pixels(b), pixels(a) | pixels(b)
    hull = pixels((min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])))
    assert giou(a, b) == pytest.approx(len(both) / len(either) - (len(hull) - len(either)) / len(hull))
    assert -1 <= giou(a, b) <= iou(a, b) <= 1
    assert giou(a, a) == iou(a, a) == 1


@given(proper, proper, st.floats(0.1, 50), st.floats(-20, 20))
def test_neither_depends_on_unit_or_origin(a, b, scale, shift):
    moved = [[v * scale + shift for v in box] for box in (a, b)]
    assert iou(*moved) == pytest.approx(iou(a, b), abs=1e-6)
    assert giou(*moved) == pytest.approx(giou(a, b), abs=1e-6)


def test_hand_worked_overlaps():
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert giou((0, 0, 1, 1), (2, 0, 3, 1)) == pytest.approx(-1 / 3)
    assert giou((0, 0, 1, 1), (9, 0, 10, 1)) < giou((0, 0, 1, 1), (2, 0, 3, 1))
    assert iou(None, (0, 0, 1, 1)) == 0 and giou(None, (0, 0, 1, 1)) == -1


COLUMNS = {
    "prompts": ["q"] * 3,
    "completions": ["a red star", [{"role": "assistant", "content": "star"}], ""],
    "completion_ids": [[1], [2], [3]],
    "box": [[0, 0, 2, 2]] * 3,
    "located": [(0, 0, 2, 2), (0, 0, 2, 1), None],
}


@pytest.mark.parametrize(
    "name, values",
    [
        ("iou", [1.0, 0.5, 0.0]),
        ("giou", [1.0, 0.5, -1.0]),
        ("hit", [1.0, 1.0, 0.0]),
        ("iou@0.6", [1.0, 0.0, 0.0]),
        ("parse", [1.0, 1.0, 0.0]),
        ("length", [-3.0, -1.0, 0.0]),
    ],
)
def test_rewards_by_name(name, values):
    assert reward_named(name)(**COLUMNS) == values


def test_weighted_sum_leaves_out_what_does_not_apply():
    def half(completions, **columns):
        return [None, 2.0, 2.0]

    total, parts = combine([iou_reward, half, length_reward], [1.0, 0.5, 0.1], 3, COLUMNS)
    assert total == pytest.approx([1.0 - 0.3, 0.5 + 1.0 - 0.1, 1.0])
    assert parts["half"] == [None, 2.0, 2.0] and set(parts) == {"iou_reward", "half", "length_reward"}


def test_misfits_are_named():
    def short(**columns):
        return [1.0]

    for call, message in (
        (lambda: reward_named("clip"), "'clip' is unknown"),
        (lambda: reward_named("iou@1.5"), "must lie in"),
        (lambda: combine([iou_reward], [1.0, 2.0], 3, COLUMNS), "2 weights for 1"),
        (lambda: combine([short], None, 3, COLUMNS), "short returned 1 values for 3"),
    ):
        with pytest.raises(UserError, match=message):
            call()


LEAKS = """
(123,456),(500,600)|the cat at (12, 40)|cat [0.1, 0.2, 0.5, 0.9]|x=120 y=300|x1: 3 the dog|<box>(1,2)|<|box_start|>3
bbox of the cat|123 456 500 600|cat 120 then 345|1 2 3 4|one two five seven|dog twelve forty nine|coordinates of it
12:30:45 55|1:05 2:10|10:45 at 7, 8|12 percent from the left, 7 percent from the top|the dog, 7% from the top
thirty percent of the way down|12% wide and 7% high|3 px and 9 pixels|x 12 y 7 w 3|x12 y7|X seven, Y two
row 3 column 4 size 2|row three, column four|width 3 height: 4|left: 3 top: 9|12 from the left, 7 from the top
two from left and five from the bottom|10:45 15:30|10:45 12 40|12:99|112112224224|a cup 11212|112,224|cup 112.224
12.34 56.78
"""
ORDINARY = """
the red umbrella|player number 23 in white|two dogs and one cat|the 2nd of 3 cups|a clock showing 10 past 4
the one on the left|woman, about 30 years old, second from the right|bus number 42 (the red one)|clock showing 10:45
a digital clock that says 10:45:30|player 23 under the clock at 9:05|sign with 50% off
a 100 percent cotton shirt on the left|third from the left in the second row|the cup 3 from the left
person in row 3, seat 12|left 2 dogs behind the top 3 cups|5 x 7 photo|bus X12 to the left|size 9 shoe
two from the left of 5 cups|4x4 car from the right|a sign with 1,000 on it|a jar of 2.5 litres|a plate with 1984
"""


def texts(block: str) -> list[str]:
    """The texts of a block, parted by lines and bars; the bars of a box token are none."""
    parts = block.strip().replace("<|box_start|>", "<box_start>").replace("\n", "|").split("|")
    return [part.replace("<box_start>", "<|box_start|>") for part in parts]


@pytest.mark.parametrize("text", texts(LEAKS))
def test_spelt_coordinates_are_leaks(text):
    assert spells_coordinates(text)


@pytest.mark.parametrize("text", ["", *texts(ORDINARY)])
def test_ordinary_descriptions_are_not(text):
    assert not spells_coordinates(text)


@pytest.mark.parametrize(
    "name", ["qwen-vl", "qwen2-vl", "qwen2.5-vl", "qwen3-vl", "llava", "internvl", "pocket"]
)
@given(left=st.floats(0, 700), top=st.floats(0, 700), width=st.floats(20, 290), height=st.floats(20, 290))
def test_every_convention_is_caught_writing_its_own_boxes(name, left, top, width, height):
    convention, size = CONVENTIONS[name], (1000, 1000)
    text = f"the cat {convention.format((left, top, left + width, top + height), size, size)} there"
    assert spells_coordinates(text, lambda text: bool(convention.parse(text, size, size)))
    if name != "pocket":  # no name but its own convention tells that w1 is a place
        assert spells_coordinates(text)


COUNTS = st.sampled_from(
    ["one dog", "two dogs", "3 of the five cups", "12 eggs", "a dozen", "the 2nd of four boys"]
)
NAMED_NUMBER = st.one_of(
    st.integers(0, 999).map(lambda n: f"player {n}"),
    st.integers(0, 99).map(lambda n: f"the jersey with #{n}"),
    st.integers(1850, 2099).map(lambda n: f"a car of {n}"),
    st.integers(0, 9999).map(lambda n: f"a price tag of ${n / 100:.2f}"),
    st.integers(0, 99).map(lambda n: f"a sign with {n}% off"),
    COUNTS,
)
TIMES = st.builds("a clock showing {}:{:02d}".format, st.integers(0, 23), st.integers(0, 59))
ENDS = st.sampled_from(
    ["", " on the left", " at the top right", " in the second row", ", third from the left"]
)


@given(NAMED_NUMBER, TIMES | st.just(""), ENDS)
def test_a_thing_known_by_its_number_is_no_leak_beside_a_clock_or_without(thing, clock, end):
    assert not spells_coordinates(f"{thing} {clock}{end}".strip())


NUMBERS = st.integers(0, 100).map(str) | st.sampled_from(["two", "seven", "twelve", "forty"])
COARSE = [
    "the cat {0} percent from the left",
    "{0}% and {1}% of it",
    "x {0} y {1} w {2}",
    "a cup, w: {0}, h: {1}",
    "row {0} column {1} size {2}",
    "{0} from the left and {1} from the top",
    "top: {0} left: {1}",
]


@given(st.sampled_from(COARSE), st.lists(NUMBERS, min_size=3, max_size=3))
def test_numbers_that_say_which_coordinate_they_are_leak_however_coarse(text, numbers):
    assert spells_coordinates(text.format(*numbers))
