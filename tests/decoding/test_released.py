"""The machine of `rules: released` makes the decisions of the released loop, call by call."""

import hashlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from released_oracle import CN, DOT, END, OPEN, UN, released_loop

from vlm_sft_rl.decoding import RetrospectiveConfig
from vlm_sft_rl.decoding.answers import CANNED_ANSWER, FALSE_PREMISE_SENTENCE, Grammar
from vlm_sft_rl.decoding.config import BRANCHES
from vlm_sft_rl.decoding.machines import CONTINUE, FINISH
from vlm_sft_rl.decoding.released import ReleasedRetrospective

WORDS = ["<end>", "<SPAN>", "</CN>", "</UN>", ".", "Cat", "dog", "(on", "3.5"]


def decode(ids):
    return " ".join(WORDS[t] for t in ids)


def plain(ids):
    raise AssertionError("the program does not clean its texts as we do")


GRAMMAR = Grammar(OPEN, CN, UN, frozenset([END]), decode, WORDS.__getitem__, plain)


def language(seed: int, malformed: float):
    """A deterministic random language model: everything depends on the hint, the prefix and the temperature."""

    def next_token(hint, ids, temperature):
        key = f"{seed}|{hint}|{ids}|{temperature:.4f}"
        rng = random.Random(hashlib.sha256(key.encode()).digest())
        inside = any(ids) and next((t for t in reversed(ids) if t in (OPEN, CN, UN)), CN) == OPEN
        draw = rng.random()
        if draw < malformed:
            token = rng.choice([OPEN, CN, UN, END])
        elif inside:
            token = rng.choice([CN, UN, 5, 6]) if ids[-1] != OPEN else rng.choice([5, 6, 7, 8])
        else:
            token = rng.choice([OPEN, OPEN, 5, 7, 8, DOT, DOT, END])
        return token, rng.choice([0.1, 0.2, 0.5, 0.7, 0.9])

    return next_token


def run_machine(machine, next_token, limit=20_000):
    """Run to the end; the hint, the accepted prefix and the temperature of every pass."""
    stage = 1

    def state():
        return machine.insertion, tuple(machine.ids), round(machine.temperature, 6)

    calls = [state()]
    for _ in range(limit):
        passes = machine.passes
        action = machine.observe(*next_token(machine.insertion, machine.ids, machine.temperature))
        if action == FINISH:
            return calls
        if machine.stage != stage or (machine.passes != passes and machine.passes):
            calls.append(state())
        stage = machine.stage
        assert action == CONTINUE or action.length == len(machine.ids)
    raise AssertionError("no end")


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 10**9),
    malformed=st.sampled_from([0.0, 0.05, 0.2]),
    tau=st.sampled_from([0.15, 0.5, 0.8]),
    local=st.integers(1, 4),
    total=st.integers(1, 25),
    t0=st.sampled_from([0.0, 1.0]),
    longest=st.sampled_from([4, 12, 60]),
    branch=st.sampled_from(BRANCHES),
    premise=st.booleans(),
)
def test_same_decisions_as_the_released_loop(
    seed, malformed, tau, local, total, t0, longest, branch, premise
):
    next_token = language(seed, malformed)

    def generate(hint, accepted, temperature):
        out, ps = [], []
        while len(out) < longest and (not out or out[-1] != END):
            token, p = next_token(hint, accepted + out, temperature)
            out.append(token)
            ps.append(p)
        return out, ps

    limits = {"tau": tau, "attempts": total, "local": local, "t0": t0, "branch": branch}
    expected = released_loop(generate, decode, **limits, open_ended=premise)
    calls, history, text = expected.calls, expected.history, expected.text
    if premise and not text:
        expected = released_loop(generate, decode, **limits, open_ended=True, second_stage=True)
        calls, history = calls + expected.calls, history + expected.history
        text = expected.text or CANNED_ANSWER
    config = RetrospectiveConfig(
        threshold=tau,
        local_attempts=local,
        total_attempts=total,
        temperature=t0,
        max_new_tokens=longest,
        rules="released",
        released_branch=branch,
        false_premise=premise,
    )
    machine = ReleasedRetrospective(config, GRAMMAR)
    assert run_machine(machine, next_token) == calls
    assert (machine.ok, machine.ids, machine.answer().text) == (expected.ok, expected.ids, text)
    rejected = [event["text"] for event in machine.trace if event["kind"] == "reject"]
    assert rejected == [phrase for phrase in history if phrase is not None]


@pytest.mark.parametrize(
    ("branch", "expected"),
    [
        ("qwen", "(Hint: potential incorrect phrases -> a cat)"),
        ("llava", f"{FALSE_PREMISE_SENTENCE}(Hint: potential incorrect phrases -> a cat)"),
        ("llama_3", f"{FALSE_PREMISE_SENTENCE} (Hint: potential incorrect phrases -> a cat) "),
    ],
)
def test_how_each_branch_words_its_hint(branch, expected):
    machine = ReleasedRetrospective(RetrospectiveConfig.released(branch, threshold=0.5), GRAMMAR)
    assert machine.insertion == ""
    machine.phrases = ["a cat"]
    assert machine._hint(False) == expected
    machine.phrases, machine.stage = [], 2
    sentence = FALSE_PREMISE_SENTENCE.removeprefix("For ") if branch == "qwen" else FALSE_PREMISE_SENTENCE
    assert machine._hint(True) == sentence


def test_an_answer_without_an_open_tag_is_cut_at_its_first_doubt():
    machine = ReleasedRetrospective(RetrospectiveConfig.released("qwen", threshold=0.5), GRAMMAR)
    script = [5, CN, 6, UN, 7, END]
    while machine.observe(script.pop(0), 0.9) != FINISH:
        pass
    answer = machine.answer()
    assert (answer.text, answer.tagged_text, answer.ok) == ("Cat  dog", "Cat </CN> dog ", True)
    assert (answer.spans, answer.verdict) == ([], None)


def test_the_settings_of_the_program():
    llava, qwen = (RetrospectiveConfig.released(branch) for branch in ("llava", "qwen"))
    assert (llava.temperature, llava.top_k, llava.max_new_tokens) == (1.0, 50, 1024)
    assert (qwen.temperature, qwen.top_k, qwen.max_new_tokens) == (0.0, None, 1024)
    assert llava.threshold == qwen.threshold == 0.003


def test_false_premise_mode_asks_twice_and_then_refuses():
    limits = {"threshold": 0.5, "total_attempts": 3, "local_attempts": 2}
    machine = ReleasedRetrospective(
        RetrospectiveConfig(**limits, false_premise=True, rules="released"), GRAMMAR
    )
    script, insertions, action = [OPEN, 5, UN, END], set(), CONTINUE
    while action != FINISH:
        insertions.add(machine.insertion)
        action = machine.observe(script[min(len(machine.ids), 3)], 0.9)
    assert (machine.answer().text, machine.answer().ok) == (CANNED_ANSWER, False)
    assert any("false premises" in text for text in insertions)
