import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlm_sft_rl.data.phrases import find_phrases, plural, replace_noun

NOUNS = ["umbrella", "star", "fish", "traffic light", "light", "bus", "scissors", "knife", "berry", "person"]


def texts(text):
    return [(p.text, p.noun) for p in find_phrases(text, NOUNS)]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (
            "At the beach there is an umbrella, a star and a fish.",
            [("an umbrella", "umbrella"), ("a star", "star"), ("a fish", "fish")],
        ),
        (
            "A small red umbrella by the traffic light",
            [("A small red umbrella", "umbrella"), ("the traffic light", "traffic light")],
        ),
        (
            "two stars, three people and 4 buses",
            [("two stars", "star"), ("three people", "person"), ("4 buses", "bus")],
        ),
        ("stars and berries", [("stars", "star"), ("berries", "berry")]),
        ("the starfish is starry; a bar star", [("star", "star")]),
        ("nothing here", []),
    ],
)
def test_phrases(caption, expected):
    assert texts(caption) == expected
    for phrase in find_phrases(caption, NOUNS):
        assert caption[phrase.start : phrase.end] == phrase.text


@pytest.mark.parametrize(
    ("phrase", "old", "new", "expected"),
    [
        ("a red umbrella", "umbrella", "star", "a red star"),
        ("an umbrella", "umbrella", "star", "a star"),
        ("A star", "star", "umbrella", "An umbrella"),
        ("two stars", "star", "knife", "two knives"),
        ("Stars", "star", "fish", "Fish"),
        ("two fish", "fish", "star", "two stars"),
        ("the traffic light", "traffic light", "bus", "the bus"),
    ],
)
def test_replace(phrase, old, new, expected):
    assert replace_noun(phrase, old, new) == expected


@given(st.sampled_from(NOUNS), st.sampled_from(NOUNS), st.sampled_from(["a", "the", "two", "A big", "some"]))
def test_a_swapped_phrase_is_one_phrase_of_the_new_noun(old, new, start):
    phrase = f"{start} {plural(old) if start in ('two', 'some') else old}"
    swapped = replace_noun(phrase, old, new)
    assert texts(swapped) == [(swapped, new)]
