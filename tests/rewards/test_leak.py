import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl.models.boxes import CONVENTIONS
from vlm_sft_rl.rewards.leak import spells_coordinates


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
