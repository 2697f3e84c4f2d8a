"""Negatives by rule and by what nouns keep company; what none of them may do."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl.data.tagging.negatives import (
    Corpus,
    Negative,
    answer_type,
    by_rule,
    draw_absent,
    fault,
    option_letters,
    prior_of,
    swap_noun,
)
from vlm_sft_rl.data.tagging.phrases import VocabularyTagger, find_phrases, plural
from vlm_sft_rl.data.tagging.verdicts import Scene
from vlm_sft_rl.errors import UserError

NOUNS = ["dog", "table", "frisbee", "sofa", "orange", "car", "owl"]
CHOICES = "Which?\nA. cat\nB. dog\nC. owl\nAnswer with the letter."


def phrase_of(answer):
    return next(iter(VocabularyTagger(NOUNS).tag([answer])))[-1]


def candidates(answer, question="Describe the image."):
    kind = answer_type(question, answer)
    return {(n.kind, n.text) for n in by_rule(phrase_of(answer), question, kind, lambda words: words[0])}


@pytest.mark.parametrize(
    ("answer", "question", "expected"),
    [
        ("Yes", "Is it?", {("yes_no", "No")}),
        ("no", "Is it?", {("yes_no", "yes")}),
        ("B", CHOICES, {("choice", "A")}),
        ("(A)", CHOICES, {("choice", "(B)")}),
        ("two dogs", "What?", {("count", "three dogs")}),
        ("5", "How many?", {("count", "2")}),
        ("one dog", "How many?", set()),
        ("a red car", "What?", {("colour", "an orange car")}),
        ("an orange", "What?", set()),
        ("a small wooden table", "What?", {("attribute", "a large wooden table"), ("attribute", "a small metal table")}),
        ("on the sofa", "Where?", {("relation", "under the sofa")}),
        ("On the left side of the table", "Where?", {("relation", "On the right side of the table")}),
        ("an owl", "What?", set()),
    ],
)  # fmt: skip
def test_each_kind(answer, question, expected):
    assert candidates(answer, question) == expected


@pytest.mark.parametrize(
    ("question", "answer", "kind"),
    [
        ("Is it red?", "Yes, it is red.", "yes_no"),
        (CHOICES, "B", "choice"),
        ("What letter is on the sign?", "B", "general_answer"),
        ("How many dogs are there?", "There are two dogs.", "count"),
        ("What color is the car?", "Red", "colour"),
        ("Describe the image.", "A red car.", "general_answer"),
    ],
)
def test_answer_types(question, answer, kind):
    assert answer_type(question, answer) == kind


def test_options():
    assert option_letters(CHOICES) == ["A", "B", "C"]
    assert option_letters("A. one thing") == option_letters("B. x\nC. y") == []


@pytest.mark.parametrize(
    ("phrase", "noun", "expected"),
    [("a red car", "owl", "a red owl"), ("a car", "owl", "an owl"), ("An owl", "car", "A car"), ("A car", "owl", "An owl"),
     ("two dogs", "owls", "two owls"), ("Dogs", "fish", "Fish"), ("a car", "unicorn", "a unicorn")],
)  # fmt: skip
def test_swapped_nouns(phrase, noun, expected):
    assert swap_noun(phrase_of(phrase), noun, noun).text == expected


# --- Ground truth and priors ---

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
]


STARTS = ["a", "the", "two", "A big", "some"]


@given(st.sampled_from(VOCABULARY), st.sampled_from(VOCABULARY), st.sampled_from(STARTS))
def test_an_absent_noun_makes_one_phrase_of_the_same_number(old, new, start):
    (phrase,) = find_phrases(f"{start} {plural(old) if start in ('two', 'some') else old}", VOCABULARY)
    wrong = draw_absent(phrase, Scene([old]), VOCABULARY, lambda scene: {new: 1.0}, random.Random(0))
    if old == new:
        assert wrong is None
        return
    (swapped,) = find_phrases(wrong.text, VOCABULARY)
    assert (swapped.text, swapped.head) == (wrong.text, new)
    assert swapped.noun.lower() == (plural(new) if start in ("two", "some") else new)


def test_priors_against_counts_by_hand():
    scenes = [
        Scene(["star", "fish"], "beach"),
        Scene(["star", "boat"], "beach"),
        Scene(["kettle"], "town"),
        Scene(["star", "fish", "boat"], "town"),
    ]
    nouns = ["boat", "fish", "kettle", "star"]
    company = prior_of("company", scenes, nouns)
    weights = company(Scene(["fish", "boat"]))
    # star stands beside both fishes and both boats; 3 of 4 pictures have it
    assert weights["star"] == pytest.approx(3 / 4 + (2 / 2 + 2 / 2) / 2)
    assert weights["kettle"] == pytest.approx(1 / 4)
    assert company(Scene([]))["star"] == 3 / 4
    assert prior_of("theme", scenes, nouns)["town"] == {"kettle": 1, "star": 1, "fish": 1, "boat": 1}
    assert prior_of("uniform", scenes, nouns) is None
    with pytest.raises(UserError, match="no `theme`"):
        prior_of("theme", [Scene(["star"])], nouns, "objects.jsonl")
    with pytest.raises(UserError, match="not one of"):
        prior_of("guess", scenes, nouns)


# --- The company that nouns keep in a data set ---

NAMED = VocabularyTagger(["moon", "star", "car", "dog", "owl", "beach"])


def named(text):
    return next(iter(NAMED.tag([text])))[-1]


@pytest.fixture(scope="module")
def corpus():
    captions = ["At the beach there is a moon and a star."] * 40 + ["A moon and a car."] * 4
    captions += ["A dog and a car."] * 20 + ["An owl."] * 20 + ["Two dogs."] * 20
    corpus = Corpus()
    for i, phrases in enumerate(NAMED.tag(captions)):
        corpus.add(f"{i}.png", phrases)
    return corpus.finish()


def test_companions_are_likeliest(corpus):
    dog = named("a dog")
    weights = corpus.weights(dog, {"moon"}, {"moon"})
    assert max(weights, key=weights.get) == "star"
    # 40 images with both of 44 with a moon, shrunk by 5, squared
    assert weights["star"] == pytest.approx((40 / 49) ** 2)
    draws = Counter(corpus.draw(dog, {"moon"}, {"moon"}, random.Random(i)).head for i in range(300))
    assert draws["star"] > 200 and "moon" not in draws and "beach" not in draws


def test_only_what_fits_the_place(corpus):
    assert set(corpus.weights(named("At the beach"), {"moon"}, set())) == {"beach"}
    assert set(corpus.weights(named("two dogs"), set(), set())) == {"dog"}
    assert corpus.draw(named("At the beach"), set(), {"beach"}, random.Random(0)) is None


def test_forms_and_words(corpus):
    drawn = corpus.draw(named("a car"), {"moon"}, {"star", "car", "moon", "dog"}, random.Random(0))
    assert (drawn.text, drawn.head, drawn.kind) == ("an owl", "owl", "object")
    assert ("at", "beach") in corpus.placed and ("on", "beach") not in corpus.placed
    picks = Counter(corpus.choose(["moon", "owl", "red"], random.Random(i)) for i in range(300))
    assert picks["red"] == 0 and picks["moon"] > picks["owl"] > 0
    assert {corpus.choose(["red", "blue"], random.Random(i)) for i in range(30)} == {"red", "blue"}


# --- Quality control ---


@pytest.mark.parametrize(
    ("phrase", "wrong", "known", "reason"),
    [
        ("a dog", "a cat", {}, None),
        ("a dog", "the dog", {}, "same as the positive"),
        ("a dog", "A  Dog", {}, "same as the positive"),
        ("a red dog", "a dog", {}, "less said, not wrong"),
        ("a dog", "a cat", {"other_phrases": ["A cat"]}, "said elsewhere in the answer"),
        ("a dog", "a big cat", {"nouns": {"cat"}}, "in the image"),
        ("a red dog", "a black dog", {"nouns": {"dog"}}, None),
        ("a dog", "an <SPAN> owl", {}, "tag inside"),
        ("a dog", "a cat.", {}, "ends in punctuation"),
        ("a dog", "a cat\nand", {}, "empty or with breaks"),
        ("a dog", "", {}, "empty or with breaks"),
        ("a dog", "a very long tale about a cat that nobody wanted to hear", {}, "length"),
        ("a dog", "a owl", {}, "wrong article"),
        ("a dog", "the cat", {}, "another article or number"),
        ("A dog", "a cat", {}, "capital letter"),
    ],
)
def test_quality_control(phrase, wrong, known, reason):
    assert fault(Negative(phrase_of(phrase), wrong, "teacher"), **{"nouns": set(), **known}) == reason


def test_a_swapped_noun_must_be_absent():
    swapped = swap_noun(phrase_of("a dog"), "car", "car")
    assert fault(swapped, {"car"}) == "in the image"
    assert fault(swapped, set(), answer_words=["cars", "car"]) == "in the image"
    assert fault(swapped, {"bus"}) is None


BEGINNINGS = ["a", "the", "two", "A small", "some red", "one", "on the", "seven old", "The first"]


@given(st.sampled_from(BEGINNINGS), st.sampled_from(NOUNS), st.integers(0, 2**32), st.sampled_from(["s", ""]))
def test_rules_make_negatives_that_pass(start, noun, seed, ending):
    text = f"{start} {noun}{ending}".replace("a owl", "an owl").replace("a orange", "an orange")
    phrase = phrase_of(text)
    if phrase.text != text:
        return
    for wrong in by_rule(phrase, "Describe the image.", "general_answer", random.Random(seed).choice):
        assert fault(wrong, set()) is None, wrong
        assert wrong.text[0].isupper() == text[0].isupper()
        assert wrong.text.split()[-1] == text.split()[-1], "a rule leaves the noun alone"
