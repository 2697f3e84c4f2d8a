"""Places and attempts of phrases, read from an answer's text and its trace."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vlm_sft_rl.data.tags import phrase_ranges, strip_tags
from vlm_sft_rl.decoding.answers import Answer, SpanRecord
from vlm_sft_rl.serving.verification import attempts_of, verification

PIECES = ["<SPAN>", "</CN>", "</UN>", " ", "a cat", "é", ",", ".", "  ", "\n", "5", "the dog "]


@given(st.lists(st.sampled_from(PIECES), max_size=24))
@example(["<SPAN>", "a cat", "\n", "</CN>"])
def test_ranges_lie_on_the_plain_text_of_any_tagged_text(pieces):
    text = "".join(pieces)
    plain, opened, phrases = strip_tags(text).strip(), None, []
    for piece in pieces:
        if piece == "<SPAN>":
            opened = ""
        elif piece in ("</CN>", "</UN>"):
            if opened is not None:
                phrases.append(opened.strip())
            opened = None
        elif opened is not None:
            opened += piece
    ranges = phrase_ranges(text)
    assert [plain[start:end] for start, end in ranges] == phrases
    assert ranges == sorted(ranges)


def event(kind, **values):
    return {"kind": kind, "p_unconfident": 0.5, **values}


@pytest.mark.parametrize(
    ("trace", "spans", "attempts"),
    [
        ([event("accept", tokens=3), event("accept", tokens=6)], 2, [1, 1]),
        ([event("reject"), event("local_rewind", to=0), event("accept", tokens=3)], 1, [2]),
        # a sentence rewind hands the draws of what it takes back to what comes there
        (
            [
                event("accept", tokens=3),
                event("reject"),
                event("sentence_rewind", to=0),
                event("accept", tokens=4),
            ],
            1,
            [3],
        ),
        # the best effort ends with the phrase whose draws were all rejected
        ([event("accept", tokens=3), event("reject"), event("reject"), event("finish")], 2, [1, 2]),
        ([event("reject"), event("resume", to=0), event("flag", tokens=3)], 1, [2]),
        ([], 2, [1, 1]),
    ],
)
def test_attempts_are_the_draws_at_a_place(trace, spans, attempts):
    records = [SpanRecord("a", 0.5, True)] * spans
    assert attempts_of(Answer("", "", True, "", "", records, trace)) == attempts


def test_an_answer_without_a_threshold_says_nothing_of_being_verified():
    answer = Answer("a cat.", "<SPAN> a cat </CN>.", True, "", "", [SpanRecord("a cat", 0.2, True)])
    found = verification(answer)
    assert (found["ok"], found["verdict"], found["threshold"]) == (None, None, None)
    assert found["phrases"] == [
        {"text": "a cat", "start": 0, "end": 5, "p_unconfident": 0.2, "accepted": True, "attempts": 1}
    ]
