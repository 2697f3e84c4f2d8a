"""Phrases and words: a closed vocabulary, and spaCy where it is installed."""

from itertools import pairwise

import pytest

from vlm_sft_rl.data.tagging.phrases import (
    Phrase,
    SpacyTagger,
    VocabularyTagger,
    find_phrases,
    fix_article,
    with_case_of,
)
from vlm_sft_rl.errors import UserError

NOUNS = ["dog", "table", "frisbee", "traffic light", "cat", "sofa", "bus", "image", "cushion"]


def phrases(tagger, answer):
    parts = next(iter(tagger.tag([answer])))
    assert all(answer[p.start : p.end] == p.text for p in parts)
    assert all(a.end <= b.start for a, b in pairwise(parts))
    assert [Phrase.from_json(p.to_json(), answer) for p in parts] == parts
    return [(p.text, p.head) for p in parts]


CASES = [
    (
        "Two dogs lie on the left side of a table.",
        [("Two dogs", "dog"), ("on the left side of a table", "table")],
    ),
    ("Yes, a cat is under the sofa.", [("Yes", ""), ("a cat", "cat"), ("under the sofa", "sofa")]),
    ("The bus in the image is white and red.", [("The bus", "bus"), ("white", ""), ("red", "")]),
    ("Red", [("Red", "")]),
    ("3", [("3", "")]),
    ("No.", [("No", "")]),
]


@pytest.mark.parametrize(("answer", "expected"), CASES)
def test_vocabulary(answer, expected):
    assert phrases(VocabularyTagger(NOUNS), answer) == expected


@pytest.mark.parametrize(("answer", "expected"), CASES)
def test_spacy(answer, expected, spacy_tagger):
    assert phrases(spacy_tagger, answer) == expected


@pytest.fixture(scope="module")
def spacy_tagger():
    pytest.importorskip("spacy")
    return SpacyTagger()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("He holds an orange frisbee in his hand.", ["an orange frisbee", "in his hand"]),
        ("It is in front of a large tree.", ["in front of a large tree"]),
        ("They wait at a traffic light.", ["at a traffic light"]),
        ("stop sign", ["stop sign"]),
        ("I do not know what this is about at all.", []),
        ("There are three of them.", ["three"]),
    ],
)
def test_spacy_finds_what_no_list_has(answer, expected, spacy_tagger):
    assert [text for text, _ in phrases(spacy_tagger, answer)] == expected


def test_heads_and_numbers(spacy_tagger):
    parts = next(iter(spacy_tagger.tag(["Three traffic lights and a man's hat."])))
    lights = parts[0]
    assert (lights.head, lights.noun, lights.plural) == ("traffic light", "traffic lights", True)
    assert parts[-1].noun == "hat" and not parts[-1].plural


def test_places_can_be_left_outside():
    assert phrases(VocabularyTagger(NOUNS, places=False), "A cat on the sofa.") == [
        ("A cat", "cat"),
        ("the sofa", "sofa"),
    ]


def test_a_model_that_is_not_there():
    pytest.importorskip("spacy")
    with pytest.raises(UserError, match="spacy download en_core_web_sm"):
        SpacyTagger("no_such_model")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a orange frisbee", "an orange frisbee"), ("An blue car", "A blue car"), ("a hour", "an hour"),
        ("an uniform", "a uniform"), ("near a old tree", "near an old tree"), ("the apple", "the apple"),
        ("a umbrella", "an umbrella"), ("an one-way street", "a one-way street"), ("vitamin a", "vitamin a"),
    ],
)  # fmt: skip
def test_articles(text, expected):
    assert fix_article(text) == expected


@pytest.mark.parametrize(
    ("model", "expected"), [("Red", "Blue"), ("red", "blue"), ("RED", "BLUE"), ("A", "Blue")]
)
def test_capitals(model, expected):
    assert with_case_of(model, "blue") == expected


VOCABULARY = [
    "umbrella",
    "star",
    "fish",
    "traffic light",
    "light",
    "bus",
    "scissors",
    "knife",
    "berry",
    "person",
    "TV",
]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("At the beach is an umbrella and a fish.", [("an umbrella", "umbrella"), ("a fish", "fish")]),
        ("A small red bus by the traffic light", [("A small red bus", "bus"), ("the traffic light", "traffic light")]),
        ("two stars, three people and 4 buses", [("two stars", "star"), ("three people", "person"), ("4 buses", "bus")]),
        ("a TV on two Tvs", [("a TV", "TV"), ("two Tvs", "TV")]),
        ("stars and berries", [("stars", "star"), ("berries", "berry")]),
        ("the starfish is starry; a bar star", [("star", "star")]),
        ("nothing here", []),
    ],
)  # fmt: skip
def test_phrases_of_a_vocabulary(caption, expected):
    parts = find_phrases(caption, VOCABULARY)
    assert [(p.text, p.head) for p in parts] == expected
    assert all(caption[p.start : p.end] == p.text and p.text.endswith(p.noun) for p in parts)
