"""The paper's algorithm as a table of small scripts, and its invariants under random ones."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_sft_rl.decoding.answers import CANNED_ANSWER, FALSE_PREMISE_SENTENCE, Grammar, hint_text
from vlm_sft_rl.decoding.config import RetrospectiveConfig
from vlm_sft_rl.decoding.machines import CONTINUE, FINISH, PlainDecoding, Rewind
from vlm_sft_rl.decoding.retrospective import Retrospective, normalized

END, OPEN, CN, UN = range(4)
WORDS = ["", "<SPAN>", "</CN>", "</UN>", ".", " a", " Cat", " dog", " U", "S", " 3", "5", "!\n", "!"]
ID = {word: i for i, word in enumerate(WORDS)}


def decode(ids):
    return "".join(WORDS[t] for t in ids)


def plain(ids):
    return "".join(WORDS[t] for t in ids if t > UN).strip()


GRAMMAR = Grammar(OPEN, CN, UN, frozenset([END]), decode, lambda t: WORDS[t], plain)


def machine(**settings_):
    settings_.setdefault("threshold", 0.5)
    return Retrospective(RetrospectiveConfig(**settings_), GRAMMAR)


def feed(m, *tokens, p=0.1):
    """Feed tokens (strings or ids); close tags get `p`. Returns the last action."""
    for token in tokens:
        action = m.observe(ID[token] if isinstance(token, str) else token, p)
    return action


def test_accepted_phrases_are_kept_and_the_answer_has_no_tags():
    m = machine()
    assert feed(m, " a", OPEN, " Cat", CN, ".", END) == FINISH
    answer = m.answer()
    assert (answer.text, answer.ok, answer.accepted_text) == ("a Cat.", True, "a Cat.")
    assert [(s.text, s.accepted) for s in answer.spans] == [("Cat", True)]


def test_the_threshold_rejects_at_equality_and_the_verdict_is_not_the_sampled_tag():
    assert isinstance(feed(machine(), OPEN, " Cat", CN, p=0.5), Rewind)
    m = machine()
    assert feed(m, OPEN, " Cat", UN, p=0.49) == CONTINUE
    assert m.ids[-1] == CN


def test_a_rejection_rewinds_to_the_last_accepted_phrase_heats_up_and_hints():
    m = machine()
    feed(m, " a", OPEN, " Cat", CN)
    action = feed(m, " a", OPEN, " dog", UN, p=0.9)
    assert action == Rewind(4, True)
    assert m.temperature == pytest.approx(0.1)
    assert m.insertion == "(Hint: potential incorrect phrases -> dog)"
    assert feed(m, OPEN, " a", CN) == CONTINUE
    assert m.temperature == 0.0


def test_without_rewriting_the_question_stays():
    m = machine(rewrite_query=False)
    assert feed(m, OPEN, " dog", UN, p=0.9) == Rewind(0, False)
    assert m.insertion == ""


def test_after_k_failed_resamplings_the_last_sentence_goes():
    m = machine(local_attempts=2)
    feed(m, OPEN, " a", CN, ".", " a", OPEN, " Cat", CN)
    actions = [feed(m, OPEN, " dog", UN, p=0.9) for _ in range(3)]
    assert [a.length for a in actions] == [8, 8, 4]
    assert decode(m.ids) == "<SPAN> a</CN>."
    # once more at the sentence's start: one sentence further back
    actions = [feed(m, OPEN, " dog", UN, p=0.9) for _ in range(2)]
    assert [a.length for a in actions] == [4, 0]
    assert feed(m, OPEN, " dog", UN, p=0.9) == Rewind(0, False)
    assert feed(m, OPEN, " dog", UN, p=0.9) == FINISH
    answer = m.answer()
    assert not answer.ok
    assert answer.accepted_text == "a. a Cat"
    assert answer.best_effort_text == answer.text == "a. a Cat dog"
    assert [s.accepted for s in answer.spans] == [True, True, False]
    assert answer.trace[-1] == {"kind": "finish", "reason": "nothing_left", "ok": False}


def test_sentence_ends_are_not_inside_numbers_abbreviations_or_spans():
    tokens = [
        ID[w] for w in (" U", ".", "S", ".", " a", " 3", ".", "5", "!", "<SPAN>", " a", ".", "</CN>", "!\n")
    ]
    assert GRAMMAR.sentence_ends(tokens) == [4, 9, 14]


def test_the_best_effort_is_the_least_doubtful_phrase_at_the_furthest_place():
    m = machine(total_attempts=2)
    feed(m, OPEN, " a", CN)
    for word, p in ((" dog", 0.9), (" Cat", 0.6), (" U", 0.8)):
        action = feed(m, OPEN, word, UN, p=p)
    assert action == FINISH
    assert m.answer().best_effort_text == "a Cat"
    assert m.answer().accepted_text == "a"


def test_no_attempts_means_the_first_doubt_ends_the_answer():
    m = machine(total_attempts=0)
    assert feed(m, OPEN, " dog", UN, p=0.9) == FINISH
    assert (m.answer().ok, m.answer().accepted_text, m.answer().best_effort_text) == (False, "", "dog")


def test_an_exhausted_answer_can_be_written_to_its_end():
    m = machine(on_exhausted="continue", total_attempts=1, temperature_step=0.3, rewrite_query=False)
    feed(m, OPEN, " a", CN)
    assert feed(m, OPEN, " Cat", UN, p=0.9) == Rewind(3, False)
    assert feed(m, OPEN, " dog", UN, p=0.8) == Rewind(3, False)
    assert m.temperature == 0.0
    assert feed(m, OPEN, " dog", UN, p=0.8) == CONTINUE
    assert m.ids[-1] == CN  # the model must not see the tag after which it has learnt to stop
    assert feed(m, " 3", OPEN, " Cat", CN, p=0.2) == CONTINUE
    assert feed(m, ".", END) == FINISH
    answer = m.answer()
    assert answer.ok is False and answer.trace[-1]["reason"] == "attempts"
    assert [(s.text, s.accepted) for s in answer.spans] == [("a", True), ("dog", False), ("Cat", True)]
    assert answer.tagged_text == "<SPAN> a</CN><SPAN> dog</UN> 3<SPAN> Cat</CN>."
    assert (answer.text, answer.accepted_text) == ("a dog 3 Cat.", "a")
    assert answer.text == answer.best_effort_text


def test_an_exhausted_answer_that_ends_up_verified_is_ok():
    m = machine(on_exhausted="continue", total_attempts=0)
    assert feed(m, OPEN, " Cat", UN, p=0.9) == Rewind(0, False)
    feed(m, OPEN, " dog", CN, ".", END)
    assert m.answer().ok and m.answer().accepted_text == m.answer().text == "dog."


def test_a_phrase_cut_by_the_length_limit_is_not_accepted():
    m = machine(max_new_tokens=4)
    assert feed(m, " a", OPEN, " Cat", " dog") == FINISH
    answer = m.answer()
    assert (answer.ok, answer.accepted_text, answer.text) == (False, "a", "a Cat dog")
    m = machine(max_new_tokens=2)
    assert feed(m, " a", " a") == FINISH
    assert m.answer().ok


def test_stray_tags_are_resampled_without_a_hint():
    for script in ((CN,), (OPEN, " a", OPEN), (OPEN, " a", END)):
        m = machine()
        assert feed(m, *script) == Rewind(0, False)
        assert m.trace[0]["p_unconfident"] is None


def test_the_hint_has_the_last_five_phrases_the_newest_last():
    m = machine(local_attempts=50)
    for i in (6, 7, 8, 9, 10, 11, 6):
        feed(m, OPEN, i, UN, p=0.9)
    assert m.insertion == "(Hint: potential incorrect phrases -> u, s, 3, 5, cat)"
    assert hint_text([]) == ""


def test_parallel_attempts_share_temperature_and_hint():
    m = machine(parallel_attempts=3, local_attempts=20)
    feed(m, OPEN, " dog", UN, p=0.9)
    assert m.temperature == pytest.approx(0.1)
    for word in (" a", " Cat"):
        assert feed(m, OPEN, word, UN, p=0.9) == Rewind(0, False)
        assert m.temperature == pytest.approx(0.1)
    assert feed(m, OPEN, " U", UN, p=0.9) == Rewind(0, True)
    assert m.temperature == pytest.approx(0.2)
    assert m.insertion.endswith("-> dog, a, cat, u)")


def test_false_premise_mode():
    m = machine(false_premise=True, total_attempts=1)
    feed(m, OPEN, " dog", UN, p=0.9)
    assert feed(m, OPEN, " dog", UN, p=0.9) == Rewind(0, True)
    assert m.insertion == FALSE_PREMISE_SENTENCE
    feed(m, OPEN, " dog", UN, p=0.9)
    assert m.insertion == f"(Hint: potential incorrect phrases -> dog) {FALSE_PREMISE_SENTENCE}"
    assert feed(m, OPEN, " dog", UN, p=0.9) == FINISH
    assert (m.answer().text, m.answer().ok, m.answer().spans) == (CANNED_ANSWER, False, [])
    answered = machine(false_premise=True, total_attempts=0)
    feed(answered, OPEN, " a", CN, ".", " a", OPEN, " Cat", CN)
    assert feed(answered, OPEN, " dog", UN, p=0.9) == FINISH
    assert answered.answer().accepted_text == "a."


def test_plain_decoding_records_phrases_and_never_rewinds():
    m = PlainDecoding(RetrospectiveConfig(max_new_tokens=7), GRAMMAR)
    assert feed(m, OPEN, " Cat", UN, CN, OPEN, " a", p=0.9) == CONTINUE
    assert feed(m, CN, p=0.2) == FINISH
    assert [(s.text, s.p_unconfident, s.accepted) for s in m.answer().spans] == [
        ("Cat", 0.9, False),
        ("a", 0.2, True),
    ]


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 10**9),
    p_bad=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    local=st.integers(1, 5),
    total=st.integers(0, 30),
    step=st.sampled_from([0.0, 0.1, 0.3]),
    t0=st.sampled_from([0.0, 0.7]),
    longest=st.integers(1, 60),
    rewrite=st.booleans(),
    premise=st.booleans(),
    parallel=st.integers(1, 4),
    go_on=st.booleans(),
    commit=st.sampled_from(["nothing", "sentence", "phrase"]),
)
def test_invariants(seed, p_bad, local, total, step, t0, longest, rewrite, premise, parallel, go_on, commit):
    config = RetrospectiveConfig(
        threshold=0.5,
        local_attempts=local,
        total_attempts=total,
        temperature=t0,
        temperature_step=step,
        max_new_tokens=longest,
        rewrite_query=rewrite,
        false_premise=premise,
        parallel_attempts=parallel,
        on_exhausted="continue" if go_on and not premise else "finish",
        commit="nothing" if premise else commit,
    )
    m = Retrospective(config, GRAMMAR)
    rng = random.Random(seed)
    steps, committed = 0, []
    while True:
        steps += 1
        assert steps < 50_000
        token = rng.choice([OPEN, CN, UN, 4, 4, 5, 6, 7, rng.choice([END, 5, 5])])
        stage, failures, checkpoint = m.stage, m.total_failures, m.checkpoint
        action = m.observe(token, 0.9 if rng.random() < p_bad else 0.1)
        assert t0 <= m.temperature <= t0 + config.temperature_span + 1e-9
        assert len(m.ids) <= longest
        assert m.insertion.count(",") <= 4 + (FALSE_PREMISE_SENTENCE in m.insertion)
        assert m.total_failures <= total
        assert m.ids[: m.committed][: len(committed)] == committed  # and that is never taken back
        committed = m.ids[: m.committed]
        assert m.committed == (m.checkpoint if config.commit == "phrase" else m.committed) <= m.checkpoint
        if action == FINISH:
            break
        if isinstance(action, Rewind) and m.stage == stage:
            assert action.length == len(m.ids) == m.checkpoint
            assert m.ids.count(OPEN) == sum(t in (CN, UN) for t in m.ids)  # never inside a span
            if m.trace[-1]["kind"] == "sentence_rewind" or m.trace[-2]["kind"] == "sentence_rewind":
                assert action.length < checkpoint  # progress
            else:
                assert action.length == checkpoint
        if m.stage == stage:
            assert m.total_failures >= failures
    answer = m.answer()
    assert answer.trace[-1]["kind"] == "finish"
    assert answer.text.startswith(GRAMMAR.plain(committed))
    assert answer.ok == (answer.trace[-1]["ok"])
    if config.on_exhausted == "finish":
        assert all(span.accepted for span in answer.spans[:-1])
    assert all(span.accepted == (span.p_unconfident < 0.5) for span in answer.spans)
    assert answer.text.startswith(answer.accepted_text) or config.on_exhausted == "finish"
    if answer.ok:
        assert answer.text == answer.accepted_text == answer.best_effort_text
        assert all(span.accepted for span in answer.spans)


def weighed(m, *tokens, p=0.1, probability=1.0):
    """Feed tokens of which each was drawn with `probability`."""
    action = None
    for token in tokens:
        number = ID[token] if isinstance(token, str) else token
        if m.tried is not None:
            same = m.tried.tokens(number)
            m.tried.weigh(same, [probability / len(same) for _ in same].copy)
        action = m.observe(number, p)
    return action


def test_where_everything_was_tried_the_sentence_goes_at_once():
    m = machine(rewrite_query=False, on_exhausted="continue")
    weighed(m, " a", ".", OPEN, " Cat", CN, probability=0.5)
    assert weighed(m, OPEN, " dog", CN, p=0.9) == Rewind(2, False)
    assert [event["kind"] for event in m.trace][-2:] == ["reject", "sentence_rewind"]
    # behind the sentence a half of a half of a half was tried
    assert m.logit_bias()[OPEN] == pytest.approx(0.1 * math.log(1 - 0.5**2))


def test_where_nothing_is_left_to_be_tried_no_attempts_are_spent():
    m = machine(rewrite_query=False, on_exhausted="continue")
    assert weighed(m, OPEN, " dog", CN, p=0.9) == Rewind(0, False)
    assert m.trace[-1]["kind"] == "resume" and m.tried is None and m.total_failures == 1


@pytest.mark.parametrize("close", [CN, UN])
def test_a_rejected_phrase_is_tried_whichever_tag_closed_it(close):
    m = machine(rewrite_query=False)
    weighed(m, OPEN, " dog", close, p=0.9, probability=0.5)
    assert m.logit_bias()[OPEN] == pytest.approx(0.1 * math.log(1 - 0.5**2))
    weighed(m, OPEN, " dog", probability=0.5)
    assert m.logit_bias() == {CN: -math.inf, UN: -math.inf}


def test_what_is_left_of_a_phrase_that_stood_complete_is_not_drawn():
    m = machine(rewrite_query=False, untried_floor=0.2)
    weighed(m, OPEN, " dog", probability=0.5)
    weighed(m, CN, p=0.9, probability=0.85)
    assert m.logit_bias()[OPEN] == pytest.approx(0.1 * math.log(0.5))
    weighed(m, OPEN)
    assert m.logit_bias() == {ID[" dog"]: -math.inf}


def test_a_word_in_the_wrong_place_closes_no_phrase_that_might_follow():
    """A stray tag, an end inside a phrase and an empty phrase say nothing of what else could come."""
    for tokens, last, open_tokens in (
        ([], CN, []),
        ([OPEN, " dog"], END, [OPEN, " dog"]),
        ([OPEN], CN, [OPEN]),
    ):
        m = machine(rewrite_query=False, untried_floor=0.5)
        weighed(m, *tokens, probability=0.5)
        weighed(m, last, p=0.9, probability=0.8)
        weighed(m, *open_tokens, probability=0.5)
        assert m.logit_bias().keys() <= {CN, UN, END} and m.tried.path[-1].tried == pytest.approx(0.8)


def test_what_is_left_of_a_complete_phrase_is_looked_at_after_every_rejection():
    m = machine(rewrite_query=False, untried_floor=0.2)
    for words, rest in (([" dog", CN], 0.7), ([" dog", " a", CN], 0.25)):
        weighed(m, OPEN, probability=0.5)
        for word in words[:-1]:
            weighed(m, word, probability=0.5 if word == " dog" else rest)
        weighed(m, words[-1], p=0.9, probability=0.7 if len(words) == 2 else 1.0)
    weighed(m, OPEN, probability=0.5)
    assert m.logit_bias() == {ID[" dog"]: -math.inf}  # 0.05 is left


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(0, 4), st.integers(1, 3))
def test_attempts_bound_an_answer_of_sure_phrases(rng, total, local):
    """Where every phrase is certain, a rejection leaves nothing to be resampled at its place."""
    m = machine(rewrite_query=False, total_attempts=total, local_attempts=local, max_new_tokens=40)
    action, rejections = CONTINUE, 0
    while action != FINISH:
        token = rng.choice([OPEN, CN, ID["."], ID[" a"], ID[" dog"], ID[" Cat"]])
        probability = rng.choice([0.01, 0.3, 1.0])
        action = weighed(m, token, p=rng.choice([0.1, 0.9]), probability=probability)
        rejections += isinstance(action, Rewind)
    # an accepted phrase takes at least two tokens, and each has one first rejection
    assert m.total_failures <= max(1, total) and rejections <= 60 * (total + 1)


def test_repeats_are_rejected_and_nothing_is_warned_of():
    m = machine(reject_repeats=True)
    feed(m, OPEN, " a", " Cat", CN)
    assert isinstance(feed(m, OPEN, " Cat", CN), Rewind)
    assert (m.trace[-2]["reason"], m.insertion) == ("repeat", "")
    assert feed(m, OPEN, " dog", CN) == CONTINUE
    m = machine()
    feed(m, OPEN, " Cat", CN)
    assert feed(m, OPEN, " Cat", CN) == CONTINUE


@pytest.mark.parametrize(
    ("phrase", "same"),
    [
        ("A  Cat.", "cat"),
        ("the cat", "cat"),
        ("a", "a"),
        ("two cats", "two cats"),
        ("(an apple),", "apple"),
        ("C++", "c++"),
        ("दाल", "दाल"),
        ("…", ""),
    ],
)
def test_phrases_that_name_the_same(phrase, same):
    assert normalized(phrase) == same
