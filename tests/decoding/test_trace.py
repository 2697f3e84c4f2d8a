"""The trace page: complete, self-contained, safe with hostile text."""

import re

import pytest
from PIL import Image

from vlm_sft_rl.decoding.answers import Answer, Counts, SpanRecord
from vlm_sft_rl.decoding.trace import answer_pieces, log_place, write_trace_html

TRACE = [
    {"kind": "accept", "text": "a cat", "p_unconfident": 0.0002, "tokens": 5},
    {
        "kind": "reject",
        "reason": "unconfident",
        "text": "<script>alert(1)</script>",
        "p_unconfident": 0.4,
        "temperature": 0.1,
        "attempt": 0,
    },
    {"kind": "local_rewind", "to": 5, "removed": " and <SPAN> a dog </UN>"},
    {"kind": "hint", "text": "(Hint: potential incorrect phrases -> a dog)"},
    {
        "kind": "reject",
        "reason": "malformed",
        "text": "x",
        "p_unconfident": None,
        "temperature": 0.1,
        "attempt": 1,
    },
    {"kind": "sentence_rewind", "to": 0, "removed": "y"},
    {"kind": "false_premise", "text": "point out the false premises"},
    {"kind": "finish", "reason": "attempts", "ok": False},
]


def answer(**changes) -> Answer:
    values = {
        "text": "There is a cat and a dog",
        "tagged_text": "There is <SPAN> a cat </CN> and <SPAN> a dog </UN>",
        "ok": False,
        "accepted_text": "There is a cat",
        "best_effort_text": "There is a cat and a dog",
        "spans": [SpanRecord("a cat", 0.0002, True), SpanRecord("a dog", 0.4, False)],
        "trace": TRACE,
        "counts": Counts(214, 12, 40, 1, 180),
        "prompt": "What <b>is</b> here?",
        "threshold": 0.003,
    }
    return Answer(**{**values, **changes})


def test_the_page_is_self_contained_and_shows_everything(tmp_path):
    path = write_trace_html(answer(), Image.new("RGB", (2000, 100), "red"), tmp_path / "trace.html")
    page = path.read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 1
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "<script" not in page and "<b>is</b>" not in page
    for shown in (
        "a cat",
        "a dog",
        "Hint: potential",
        "0.003",
        "214 (prompt 180)",
        "false premises",
        "17.83",
        "not fully",
    ):
        assert shown in page, shown
    assert page.count('class="tau"') == 2


def test_candidates_replies_and_votes_are_drawn(tmp_path):
    trace = [
        {"kind": "candidates", "texts": ["first one", "<b>second</b>"]},
        {"kind": "candidates", "texts": ["a third"], "probabilities": [0.125]},
        {"kind": "asked", "text": "I choose response 2"},
        {"kind": "search", "name": "best_of_n", "drawn": 2, "asked": 1, "scored": 0},
        {"kind": "vote", "keys": ["one", None], "chosen": 1},
    ]
    page = write_trace_html(answer(trace=trace), None, tmp_path / "t.html").read_text(encoding="utf-8")
    for shown in (
        "first one",
        "&lt;b&gt;second",
        "I choose response 2",
        "2 drawn",
        "probability 0.12",
        "one, none; candidate 2 is kept",
    ):
        assert shown in page, shown


@pytest.mark.parametrize("image", [None, [Image.new("RGB", (4, 4)), Image.new("L", (4, 4))]])
def test_any_number_of_images(image, tmp_path):
    page = write_trace_html(answer(), image, tmp_path / "t.html").read_text(encoding="utf-8")
    assert page.count("<img") == (2 if image else 0)


def test_plain_answers_and_cut_phrases_can_be_drawn(tmp_path):
    plain = answer(trace=[], threshold=None, ok=True)
    assert "Plain decoding" in write_trace_html(plain, None, tmp_path / "a.html").read_text(encoding="utf-8")
    cut = answer(tagged_text="There is <SPAN> a ca", text="There is a ca", spans=[])
    assert answer_pieces(cut) == [{"text": "There is a ca", "span": None}]
    write_trace_html(cut, None, tmp_path / "b.html")


def test_the_bar_is_logarithmic_and_bounded():
    assert [log_place(p) for p in (0.0, 1e-6, 1e-3, 1.0)] == pytest.approx([0, 0, 50, 100])


@pytest.mark.parametrize(
    ("changes", "badge"),
    [
        ({"ok": True}, "every phrase verified"),
        ({}, "not fully verified"),
        ({"ok": True, "spans": [], "tagged_text": "Nothing."}, "nothing to verify"),
        ({"ok": True, "threshold": None}, "not verified (plain decoding)"),
    ],
)
def test_the_page_says_how_far_the_answer_was_verified(tmp_path, changes, badge):
    page = write_trace_html(answer(**changes), None, tmp_path / "trace.html").read_text(encoding="utf-8")
    states = ("every phrase verified", "not fully verified", "nothing to verify", "not verified (plain")
    assert [state for state in states if state in page] == [state for state in states if state in badge]
