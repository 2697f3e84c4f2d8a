import pickle

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl.data import tags
from vlm_sft_rl.data.tags import Span, TagError, Text

words = st.text(alphabet="abzéß中19.", min_size=1, max_size=6).filter(lambda w: w[0].isalnum())
phrases = st.lists(words, min_size=1, max_size=3).map(" ".join)


@st.composite
def plain_and_ranges(draw):
    """Text of single-spaced words with punctuation, and ranges that begin and end at words."""
    text, ranges = "", []
    for tagged, phrase in draw(st.lists(st.tuples(st.booleans(), phrases), max_size=6)):
        text += " " if text else ""
        start = len(text)
        text += phrase
        if tagged:
            ranges.append((start, len(text), draw(st.booleans())))
        text += draw(st.sampled_from(["", ",", ".", "!", " and", "\nThen"]))
    return text, ranges


@given(plain_and_ranges())
def test_tagging_then_stripping_gives_the_text_back(case):
    text, ranges = case
    tagged = tags.tag_ranges(text, ranges)
    assert tags.strip_tags(tagged) == text
    assert [(s.phrase, s.confident) for s in tags.spans(tagged)] == [(text[a:b], c) for a, b, c in ranges]


@given(st.text(alphabet="ab. 3U\n,"))
def test_untagged_text_is_never_touched(text):
    assert tags.strip_tags(text) == text


@given(st.lists(st.sampled_from([*tags.VERIFICATION_TOKENS, " a cat", ", ", "3.5", "U.S."]), max_size=12))
def test_stripping_leaves_no_tag_and_loses_no_word(pieces):
    stripped = tags.strip_tags("".join(pieces))
    assert not any(tag in stripped for tag in tags.VERIFICATION_TOKENS)
    words_only = "".join(p for p in pieces if p not in tags.VERIFICATION_TOKENS)
    assert stripped.replace(" ", "") == words_only.replace(" ", "")


@given(st.lists(st.sampled_from([*tags.VERIFICATION_TOKENS, " a "]), max_size=10))
def test_parse_agrees_with_a_stack_machine(pieces):
    depth, filled, good = 0, False, True
    for piece in pieces:
        if piece == tags.OPEN:
            good, depth, filled = good and depth == 0, 1, False
        elif piece in tags.VERIFICATION_TOKENS:
            good, depth = good and depth == 1 and filled, 0
        else:
            filled = True
    good = good and depth == 0
    if good:
        tags.parse("".join(pieces))
    else:
        with pytest.raises(TagError):
            tags.parse("".join(pieces))


def test_canonical_form():
    text = "There is <SPAN> a blue kettle </CN> and <SPAN> a toaster </UN>."
    assert tags.parse(text) == [
        Text("There is ", 0),
        Span("a blue kettle", True, 9, 35),
        Text(" and ", 35),
        Span("a toaster", False, 40, 62),
        Text(".", 62),
    ]
    assert tags.strip_tags(text) == "There is a blue kettle and a toaster."


@pytest.mark.parametrize(
    ("tagged", "plain"),
    [
        ("It costs <SPAN> 3.5 dollars </CN> in the U.S. today.", "It costs 3.5 dollars in the U.S. today."),
        ("next to <SPAN> a toaster </CN> .", "next to a toaster."),
        ("<SPAN> Yes </CN>, it is.", "Yes, it is."),
        ("weighs <SPAN> a stone </CN> .5 more", "weighs a stone .5 more"),
        ("<SPAN>a cat</CN>and <SPAN> a dog </CN>", "a cat and a dog"),
        ("a cat<SPAN> on a mat </CN>", "a cat on a mat"),
        ("(<SPAN> a cat </CN>)", "(a cat)"),
        ("There is <SPAN> a ca", "There is a ca"),
        ("one\n<SPAN> two </CN>\nthree", "one\ntwo\nthree"),
        ("<SPAN> a cat </CN> <SPAN> a dog </UN>", "a cat a dog"),
    ],
)
def test_strip_cases(tagged, plain):
    assert tags.strip_tags(tagged) == plain


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("a <SPAN> b", 2),
        ("a </UN>", 2),
        ("<SPAN> a <SPAN> b </CN>", 9),
        ("<SPAN> a </CN> b </CN>", 17),
        ("ab <SPAN>  </CN>", 3),
    ],
)
def test_errors_name_the_position(text, position):
    with pytest.raises(TagError) as caught:
        tags.parse(text)
    assert caught.value.position == position
    assert str(position) in str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).position == position


def test_phrases_that_cannot_be_tagged():
    for phrase in ("", "  ", "a </CN> b"):
        with pytest.raises(TagError):
            tags.format_span(phrase, True)
    with pytest.raises(TagError):
        tags.tag_ranges("a cat", [(0, 5, True), (2, 5, True)])


def test_a_verdict_that_a_few_rows_have_is_found_among_many():
    rows = [
        {
            "id": str(i),
            "messages": [
                {"role": "user", "content": "What?"},
                {"role": "assistant", "content": "<SPAN>a cup</UN>" if i == 4999 else "<SPAN>a cup</CN>"},
            ],
        }
        for i in range(5001)
    ]
    assert tags.count_tagged(Dataset.from_list(rows)) == tags.count_tagged(rows)
    assert tags.count_tagged(rows) == tags.TagCounts(5001, 5001, 5000, 1)
