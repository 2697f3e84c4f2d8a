import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl.models.boxes import CONVENTIONS
from vlm_sft_rl.rewards.regions import spells_coordinates


def reader(name):
    convention = CONVENTIONS[name]
    return lambda text: bool(convention.parse(text, (1000, 1000), (1000, 1000)))


@pytest.mark.parametrize(
    "text",
    [
        "(123,456),(500,600)",
        "the cat at (12, 40)",
        "cat [0.1, 0.2, 0.5, 0.9]",
        "x=120 y=300",
        "x1: 3 the dog",
        "<box>(1,2)",
        "<|box_start|>3",
        "bbox of the cat",
        "123 456 500 600",
        "cat 120 then 345",
        "1 2 3 4",
        "one two five seven",
        "dog twelve forty nine",
        "coordinates of it",
        "12:30:45 55",
        "1:05 2:10",
        "10:45 at 7, 8",
        "12 percent from the left, 7 percent from the top",
        "the dog, 7% from the top",
        "thirty percent of the way down",
        "12% wide and 7% high",
        "3 px and 9 pixels",
        "x 12 y 7 w 3",
        "x12 y7",
        "X seven, Y two",
        "row 3 column 4 size 2",
        "row three, column four",
        "width 3 height: 4",
        "left: 3 top: 9",
        "12 from the left, 7 from the top",
        "two from left and five from the bottom",
        "10:45 15:30",
        "10:45 12 40",
        "12:99",
        "112112224224",
        "a cup 11212",
        "112,224",
        "cup 112.224",
        "12.34 56.78",
    ],
)
def test_spelt_coordinates_are_leaks(text):
    assert spells_coordinates(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "the red umbrella",
        "player number 23 in white",
        "two dogs and one cat",
        "the 2nd of 3 cups",
        "a clock showing 10 past 4",
        "the one on the left",
        "woman, about 30 years old, second from the right",
        "bus number 42 (the red one)",
        "clock showing 10:45",
        "a digital clock that says 10:45:30",
        "player 23 under the clock at 9:05",
        "sign with 50% off",
        "a 100 percent cotton shirt on the left",
        "third from the left in the second row",
        "the cup 3 from the left",
        "person in row 3, seat 12",
        "left 2 dogs behind the top 3 cups",
        "5 x 7 photo",
        "bus X12 to the left",
        "size 9 shoe",
        "two from the left of 5 cups",
        "4x4 car from the right",
        "a sign with 1,000 on it",
        "a jar of 2.5 litres",
        "a plate with 1984",
    ],
)
def test_ordinary_descriptions_are_not(text):
    assert not spells_coordinates(text)


@pytest.mark.parametrize(
    "name", ["qwen-vl", "qwen2-vl", "qwen2.5-vl", "qwen3-vl", "llava", "internvl", "pocket"]
)
@given(left=st.floats(0, 700), top=st.floats(0, 700), width=st.floats(20, 290), height=st.floats(20, 290))
def test_every_convention_is_caught_writing_its_own_boxes(name, left, top, width, height):
    box = CONVENTIONS[name].format((left, top, left + width, top + height), (1000, 1000), (1000, 1000))
    assert spells_coordinates(f"the cat {box} there", reader(name))
    if name != "pocket":  # no name but its own convention tells that w1 is a place
        assert spells_coordinates(f"the cat {box} there")


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


@given(
    st.sampled_from(
        [
            "the cat {0} percent from the left",
            "{0}% and {1}% of it",
            "x {0} y {1} w {2}",
            "a cup, w: {0}, h: {1}",
            "row {0} column {1} size {2}",
            "{0} from the left and {1} from the top",
            "top: {0} left: {1}",
        ]
    ),
    st.lists(NUMBERS, min_size=3, max_size=3),
)
def test_numbers_that_say_which_coordinate_they_are_leak_however_coarse(text, numbers):
    assert spells_coordinates(text.format(*numbers))
