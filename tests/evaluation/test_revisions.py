"""Revisions of decoded answers: doubted phrases left out, an early end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl.data.tags import strip_tags
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.revisions import derive, drop_phrases, scored, split_phrases, stop_before

TAUS = (0.1, 0.3, 0.5, 0.7, 0.9)


def tagged(text):
    """`[a dog]` is a phrase the verifier accepts, `{a dog}` one it doubts."""
    verdicts = [0.1 if mark == "[" else 0.9 for mark in text if mark in "[{"]
    for mark, tag in {"[": "<SPAN> ", "]": " </CN>", "{": "<SPAN> ", "}": " </UN>"}.items():
        text = text.replace(mark, tag)
    return text, verdicts


def sample(text, *phrases):
    text, verdicts = tagged(text)
    spans = [
        {"text": phrase, "p_unconfident": p, "accepted": p < 0.5}
        for phrase, p in zip(phrases, verdicts, strict=True)
    ]
    counts = {"tokens_kept": 9}
    return {"id": "1", "answer": strip_tags(text), "tagged_answer": text, "spans": spans, "counts": counts}


@pytest.mark.parametrize(
    "text, dropped, stopped",
    [
        ("There is [a dog].", "There is a dog.", "There is a dog."),
        ("There is {a dog}.", "", ""),
        ("There is [a dog] and {a cat}.", "There is a dog.", "There is a dog."),
        ("There is {a dog} and [a cat].", "There is a cat.", ""),
        ("There is [a dog], {a cat} and [a fish].", "There is a dog and a fish.", "There is a dog."),
        ("There is {a dog}, [a cat], and [a fish].", "There is a cat and a fish.", ""),
        ("There is [a], [b], {c}, and [d].", "There is a, b, and d.", "There is a, b."),
        ("At the beach there is [a star], {a sun}, [a cup].", "At the beach there is a star, a cup.", None),
        ("There is [a dog] next to {a cat}.", "There is a dog.", "There is a dog."),
        ("There is {a dog} next to [a cat].", "There is a cat.", ""),
        ("[A man] holds {a bat} in the park.", "A man in the park.", "A man."),
        ("{A man} holds [a bat].", "A bat.", ""),
        ("[A dog]. {A cat}. [A fish].", "A dog. A fish.", "A dog."),
        ("It is 3.5 m wide. There is {a dog}.", "It is 3.5 m wide.", "It is 3.5 m wide."),
        ("{Yes}", "", ""),
        ("{Yes}, there is [a dog].", "A dog.", ""),
        ("No tags, e.g. here.", "No tags, e.g. here.", "No tags, e.g. here."),
        ("[a dog] {a cat}", "a dog", "a dog."),
        ("", "", ""),
    ],
)
def test_reads_as_a_person_would_write_it(text, dropped, stopped):
    answer, verdicts = tagged(text)
    assert strip_tags(drop_phrases(answer, verdicts, 0.5)) == dropped
    if stopped is not None:
        assert strip_tags(stop_before(answer, verdicts, 0.5)) == stopped


def test_the_threshold_itself_is_accepted():
    answer, _ = tagged("There is [a dog].")
    assert drop_phrases(answer, [0.3], 0.3) == answer
    assert drop_phrases(answer, [0.3000001], 0.3) == ""


def test_unclosed_and_stray_tags_are_no_phrases():
    text = "x </CN> <SPAN> a <SPAN> b </UN> y <SPAN> cut"
    pieces = split_phrases(text)
    assert [piece for piece, is_phrase in pieces if is_phrase] == ["<SPAN> b </UN>"]
    assert "".join(piece for piece, _ in pieces) == text


def test_verdicts_that_do_not_match_the_answer_are_an_error():
    with pytest.raises(UserError, match="2 closed phrases, but 1 verdicts"):
        drop_phrases(tagged("[a] and [b]")[0], [0.1], 0.5)
    with pytest.raises(UserError, match="sample 'q7'"):
        derive({"id": "q7", "tagged_answer": "[a]", "spans": [{"p_unconfident": 0.1}]}, "drop", 0.5)


@st.composite
def answers(draw):
    """A tagged text, its phrases with their tags, and their probabilities."""
    nouns = st.sampled_from(["a dog", "an umbrella", "the cat", "two fish"])
    probabilities = st.sampled_from([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    joins = st.sampled_from([", ", " and ", ", and ", " next to ", ". There is ", ". "])
    text = draw(st.sampled_from(["There is ", "", "Here, "]))
    verdicts = []
    for noun, p in draw(st.lists(st.tuples(nouns, probabilities), max_size=6)):
        text += (draw(joins) if verdicts else "") + f"<SPAN> {noun} {'</UN>' if p > 0.5 else '</CN>'}"
        verdicts.append(p)
    return text + draw(st.sampled_from([".", "", " here."])), verdicts


def phrases(text):
    return [piece.lower() for piece, is_phrase in split_phrases(text) if is_phrase]


@given(answers(), st.sampled_from(TAUS))
def test_exactly_the_accepted_phrases_stay_in_order(answer, tau):
    text, verdicts = answer
    dropped, stopped = drop_phrases(text, verdicts, tau), stop_before(text, verdicts, tau)
    first = next((i for i, p in enumerate(verdicts) if p > tau), len(verdicts))
    assert phrases(dropped) == [piece for piece, p in zip(phrases(text), verdicts, strict=True) if p <= tau]
    assert phrases(stopped) == phrases(text)[:first]
    assert len(dropped) <= len(text) and text.startswith(stopped.removesuffix("."))
    if first == len(verdicts):
        assert dropped == stopped == text


@given(answers())
def test_looser_thresholds_keep_more(answer):
    dropped, stopped = (
        [len(phrases(revise(*answer, tau))) for tau in TAUS] for revise in (drop_phrases, stop_before)
    )
    assert dropped == sorted(dropped)
    assert all(few <= many for few, many in zip(stopped, dropped, strict=True))


def test_derived_sample_is_consistent():
    greedy = sample("There is [a dog], {a cat} and [a fish].", "a dog", "a cat", "a fish")
    dropped, stopped = derive(greedy, "drop", 0.5), derive(greedy, "stop", 0.5)
    assert dropped["answer"] == dropped["accepted_answer"] == "There is a dog and a fish."
    assert [span["text"] for span in dropped["spans"]] == ["a dog", "a fish"]
    assert dropped["trace"] == [{"kind": "drop", "text": "a cat", "p_unconfident": 0.9}]
    assert stopped["answer"] == "There is a dog." and len(stopped["spans"]) == 1
    assert dropped["counts"] == greedy["counts"] and dropped["ok"]
    assert greedy["answer"] == "There is a dog, a cat and a fish."


@pytest.mark.parametrize("mode", ["drop", "stop"])
def test_staged_answers_are_scored_by_their_conclusion(mode):
    staged = sample("<CAPTION> [a dog]. </CAPTION>\n\n<CONCLUSION> [2] </CONCLUSION>", "a dog", "2")
    derived = derive(staged, mode, 0.5)
    assert derived["answer"] == "2" and derived["tagged_answer"] == staged["tagged_answer"]
    assert scored(" <SPAN>a dog</UN> ") == "a dog"
