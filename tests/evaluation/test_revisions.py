import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl.data.tags import strip_tags
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.metrics import load_metric
from vlm_sft_rl.evaluation.revisions import derive, drop_phrases, scored, split_phrases, stop_before, vote
from vlm_sft_rl.graders.grade import majority_index


def tagged(text):
    """`[a dog]` is a phrase the verifier accepts, `{a dog}` one it doubts."""
    verdicts = [0.1 if mark == "[" else 0.9 for mark in text if mark in "[{"]
    for mark, tag in {"[": "<SPAN> ", "]": " </CN>", "{": "<SPAN> ", "}": " </UN>"}.items():
        text = text.replace(mark, tag)
    return text, verdicts


CASES = [
    # text, dropped, stopped
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
]


@pytest.mark.parametrize("text, dropped, stopped", CASES)
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
    pieces = split_phrases("x </CN> <SPAN> a <SPAN> b </UN> y <SPAN> cut")
    assert [piece for piece, is_phrase in pieces if is_phrase] == ["<SPAN> b </UN>"]
    assert "".join(piece for piece, _ in pieces) == "x </CN> <SPAN> a <SPAN> b </UN> y <SPAN> cut"


def test_verdicts_that_do_not_match_the_answer_are_an_error():
    with pytest.raises(UserError, match="2 closed phrases, but 1 verdicts"):
        drop_phrases(tagged("[a] and [b]")[0], [0.1], 0.5)
    with pytest.raises(UserError, match="sample 'q7'"):
        derive({"id": "q7", "tagged_answer": "[a]", "spans": [{"p_unconfident": 0.1}]}, "drop", 0.5)


nouns = ["a dog", "an umbrella", "the cat", "two fish"]
phrases = st.tuples(st.sampled_from(nouns), st.sampled_from([0.0, 0.2, 0.4, 0.6, 0.8, 1.0]))
joins = st.sampled_from([", ", " and ", ", and ", " next to ", ". There is ", ". "])


@st.composite
def answers(draw):
    chosen = draw(st.lists(phrases, max_size=6))
    text = draw(st.sampled_from(["There is ", "", "Here, "]))
    for index, (noun, p) in enumerate(chosen):
        text += (draw(joins) if index else "") + f"<SPAN> {noun} {'</UN>' if p > 0.5 else '</CN>'}"
    return text + draw(st.sampled_from([".", "", " here."])), chosen


def phrase_texts(text):
    return [piece.lower() for piece, is_phrase in split_phrases(text) if is_phrase]


@given(answers(), st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9]))
def test_drop_keeps_exactly_the_accepted_phrases_in_order(answer, threshold):
    text, chosen = answer
    verdicts = [p for _, p in chosen]
    result = drop_phrases(text, verdicts, threshold)
    expected = [piece for piece, p in zip(phrase_texts(text), verdicts, strict=True) if p <= threshold]
    assert phrase_texts(result) == expected
    if len(expected) == len(chosen):
        assert result == text
    assert len(result) <= len(text)


@given(answers(), st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9]))
def test_stop_keeps_exactly_the_phrases_before_the_first_doubt(answer, threshold):
    text, chosen = answer
    verdicts = [p for _, p in chosen]
    first = next((i for i, p in enumerate(verdicts) if p > threshold), len(verdicts))
    result = stop_before(text, verdicts, threshold)
    assert phrase_texts(result) == phrase_texts(text)[:first]
    if first == len(verdicts):
        assert result == text
    else:
        assert text.startswith(result.removesuffix("."))


@given(answers())
def test_looser_thresholds_keep_more(answer):
    text, chosen = answer
    verdicts = [p for _, p in chosen]
    kept = [len(phrase_texts(drop_phrases(text, verdicts, tau))) for tau in (0.1, 0.3, 0.5, 0.7, 0.9)]
    assert kept == sorted(kept)
    for tau in (0.1, 0.5, 0.9):
        stopped = len(phrase_texts(stop_before(text, verdicts, tau)))
        assert stopped <= len(phrase_texts(drop_phrases(text, verdicts, tau)))


def test_derived_sample_is_consistent():
    answer, verdicts = tagged("There is [a dog], {a cat} and [a fish].")
    spans = [
        {"text": text, "p_unconfident": p, "accepted": p < 0.5}
        for text, p in zip(["a dog", "a cat", "a fish"], verdicts, strict=True)
    ]
    sample = {
        "id": "1",
        "answer": strip_tags(answer),
        "tagged_answer": answer,
        "spans": spans,
        "counts": {"tokens_kept": 9},
    }
    dropped, stopped = derive(sample, "drop", 0.5), derive(sample, "stop", 0.5)
    assert dropped["answer"] == dropped["accepted_answer"] == "There is a dog and a fish."
    assert [span["text"] for span in dropped["spans"]] == ["a dog", "a fish"]
    assert dropped["trace"] == [{"kind": "drop", "text": "a cat", "p_unconfident": 0.9}]
    assert stopped["answer"] == "There is a dog." and len(stopped["spans"]) == 1
    assert dropped["counts"] == sample["counts"] and dropped["ok"]
    assert sample["answer"] == "There is a dog, a cat and a fish."


@pytest.mark.parametrize("mode", ["drop", "stop"])
def test_staged_answers_are_scored_by_their_conclusion(mode):
    answer, verdicts = tagged("<CAPTION> [a dog]. </CAPTION>\n\n<CONCLUSION> [2] </CONCLUSION>")
    spans = [
        {"text": text, "p_unconfident": p, "accepted": True}
        for text, p in zip(["a dog", "2"], verdicts, strict=True)
    ]
    sample = {"id": "1", "answer": "2", "tagged_answer": answer, "spans": spans, "counts": {}}
    assert derive(sample, mode, 0.5)["answer"] == "2" and derive(sample, mode, 0.5)["tagged_answer"] == answer


def drawn(*texts, answer=None):
    trace = [{"kind": "candidates", "texts": list(texts)}]
    answer = texts[0] if answer is None else answer
    return {"id": "a", "answer": answer, "trace": trace, "reference": {"answer": "yes"}}


@pytest.mark.parametrize(
    ("keys", "chosen"),
    [
        (["a", "b", "b"], 1),
        (["a", "b"], 0),
        (["b", "a", "a", "b"], 0),
        ([None, None, "x"], 2),
        ([None, "x", None, "y", "y"], 3),
        ([None], None),
        ([], None),
    ],
)
def test_the_majority_is_the_first_of_the_most_frequent(keys, chosen):
    assert majority_index(keys) == chosen


@pytest.mark.parametrize(
    ("texts", "answer", "keys"),
    [
        (["no", "Yes, it is.", "yes"], "Yes, it is.", ["no", "yes", "yes"]),
        (["who knows", "no"], "no", [None, "no"]),
        (["who knows", "maybe"], "who knows", [None, None]),
        (
            ["<CAPTION> no </CAPTION>\n\n<CONCLUSION> yes </CONCLUSION>", "no", "yes"],
            "yes",
            ["yes", "no", "yes"],
        ),
        (["<SPAN>no</CN>", "yes", "no"], "no", ["no", "yes", "no"]),
    ],
)
def test_the_vote_reads_candidates_as_they_are_scored(texts, answer, keys):
    sample = vote(drawn(*texts), load_metric("yes_no", {}))
    assert sample["answer"] == answer == sample["accepted_answer"]
    assert sample["trace"][-1]["kind"] == "vote" and sample["trace"][-1]["keys"] == keys


@pytest.mark.parametrize(
    ("selected", "texts", "answer"),
    [
        ("yes", ["no", "no", "yes"], "yes"),  # a candidate says so: the model's choice stands
        ("yes", ["no", "no", "who knows"], "no"),  # no candidate says so
        ("hm", ["no", "yes", "yes"], "yes"),
        ("hm", ["who", "knows"], "hm"),  # nothing to fall back to
    ],
)
def test_the_fallback_is_for_selections_outside_the_candidates(selected, texts, answer):
    sample = vote(drawn(*texts, answer=selected), load_metric("yes_no", {}), keep_selected=True)
    assert sample["answer"] == answer


def test_a_released_grader_gives_no_answer_away():
    """Its rules credit outputs without an answer with the true one; a vote that read by them would know it."""
    metric = load_metric("answer_accuracy", {"grader": "geoqa", "rules": "released"})
    reference = {"answer": "B", "choices": ["one", "two"]}
    outputs = ["1", "2", "3", "4", "5"]
    assert any(metric.grade(text, reference) for text in outputs)
    assert [metric.read(text, reference) for text in outputs] == [None] * 5
    assert metric.read("Answer: (A)", reference) == "A"


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("<CAPTION> x </CAPTION>\n\n<CONCLUSION> <SPAN>2</CN> </CONCLUSION>", "2"),
        (" <SPAN>a dog</UN> ", "a dog"),
    ],
)
def test_candidates_are_scored_without_tags_and_by_their_conclusion(text, read):
    assert scored(text) == read
