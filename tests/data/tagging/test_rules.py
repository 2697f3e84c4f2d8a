"""Negatives by rule: each kind, and what none of them may do."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlm_sft_rl.data.tagging.quality import Facts, fault
from vlm_sft_rl.data.tagging.rules import Negative, answer_type, by_rule, options, swap_noun
from vlm_sft_rl.data.tagging.taggers import Chunk, VocabularyTagger

NOUNS = ["dog", "table", "frisbee", "sofa", "orange", "car", "owl"]
CHOICES = "Which?\nA. cat\nB. dog\nC. owl\nAnswer with the letter."


def chunk_of(answer):
    return next(iter(VocabularyTagger(NOUNS).tag([answer])))[-1]


def candidates(answer, question="Describe the image."):
    kind = answer_type(question, answer)
    return {(n.kind, n.text) for n in by_rule(chunk_of(answer), question, kind, lambda words: words[0])}


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
    assert (
        options(CHOICES) == ["A", "B", "C"] and options("A. one thing") == [] and options("B. x\nC. y") == []
    )


@pytest.mark.parametrize(
    ("phrase", "noun", "expected"),
    [("a red car", "owl", "a red owl"), ("a car", "owl", "an owl"), ("An owl", "car", "A car"),
     ("two dogs", "owls", "two owls")],
)  # fmt: skip
def test_swapped_nouns(phrase, noun, expected):
    assert swap_noun(chunk_of(phrase), noun, noun).text == expected


def negative(chunk, text, kind="teacher", head=""):
    return Negative(chunk, text, kind, head)


@pytest.mark.parametrize(
    ("phrase", "wrong", "facts", "reason"),
    [
        ("a dog", "a cat", {}, None),
        ("a dog", "the dog", {}, "same as the positive"),
        ("a dog", "A  Dog", {}, "same as the positive"),
        ("a red dog", "a dog", {}, "less said, not wrong"),
        ("a dog", "a cat", {"phrases": ["A cat"]}, "said elsewhere in the answer"),
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
def test_quality_control(phrase, wrong, facts, reason):
    known = {"nouns": set(), **facts}
    assert fault(negative(chunk_of(phrase), wrong), Facts(**known)) == reason


def test_a_swapped_noun_must_be_absent():
    swapped = negative(chunk_of("a dog"), "a car", "object", "car")
    assert (
        fault(swapped, Facts({"car"}))
        == fault(swapped, Facts(set(), words=["cars", "car"]))
        == "in the image"
    )
    assert fault(swapped, Facts({"bus"})) is None


STARTS = ["a", "the", "two", "A small", "some red", "one", "on the", "seven old", "The first"]


@given(st.sampled_from(STARTS), st.sampled_from(NOUNS), st.integers(0, 2**32), st.sampled_from(["s", ""]))
def test_rules_make_negatives_that_pass(start, noun, seed, plural):
    phrase = f"{start} {noun}{plural}"
    phrase = phrase.replace("a owl", "an owl").replace("a orange", "an orange")
    rng = random.Random(seed)
    chunk: Chunk = chunk_of(phrase)
    if chunk.text != phrase:
        return
    for wrong in by_rule(chunk, "Describe the image.", "general_answer", rng.choice):
        assert fault(wrong, Facts(set())) is None, wrong
        assert wrong.text[0].isupper() == phrase[0].isupper()
        assert wrong.text.split()[-1] == phrase.split()[-1], "a rule leaves the noun alone"
