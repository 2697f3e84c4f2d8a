"""The machine of `rules: released` makes the decisions of the released loop, call by call."""

import hashlib
import random

from hypothesis import given, settings
from hypothesis import strategies as st
from released_oracle import CN, DOT, END, OPEN, UN, released_loop

from vlm_sft_rl.decoding import RetrospectiveConfig
from vlm_sft_rl.decoding.answers import CANNED_ANSWER, Grammar
from vlm_sft_rl.decoding.machines import CONTINUE, FINISH
from vlm_sft_rl.decoding.released import ReleasedRetrospective

WORDS = ["<end>", "<SPAN>", "</CN>", "</UN>", ".", "Cat", "dog", "on", "two"]


def decode(ids):
    return " ".join(WORDS[t] for t in ids)


def plain(ids):
    return decode(t for t in ids if t not in (OPEN, CN, UN))


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

    def state():
        return machine.insertion, tuple(machine.ids), round(machine.temperature, 6)

    calls = [state()]
    for _ in range(limit):
        passes = machine.passes
        action = machine.observe(*next_token(machine.insertion, machine.ids, machine.temperature))
        if action == FINISH:
            return calls
        if machine.passes != passes and machine.passes:
            calls.append(state())
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
    always=st.booleans(),
)
def test_same_decisions_as_the_released_loop(seed, malformed, tau, local, total, t0, longest, always):
    next_token = language(seed, malformed)

    def generate(hint, accepted, temperature):
        out, ps = [], []
        while len(out) < longest and (not out or out[-1] != END):
            token, p = next_token(hint, accepted + out, temperature)
            out.append(token)
            ps.append(p)
        return out, ps

    limits = {"tau": tau, "attempts": total, "local": local, "t0": t0, "premise_always": always}
    expected = released_loop(generate, decode, plain, **limits)
    config = RetrospectiveConfig(
        threshold=tau,
        local_attempts=local,
        total_attempts=total,
        temperature=t0,
        max_new_tokens=longest,
        rules="released",
        premise_sentence_in_every_hint=always,
    )
    machine = ReleasedRetrospective(config, GRAMMAR)
    assert run_machine(machine, next_token) == expected.calls
    assert (machine.ok, machine.ids) == (expected.ok, expected.ids)
    rejected = [event["text"] for event in machine.trace if event["kind"] == "reject"]
    assert rejected == [phrase for phrase in expected.history if phrase is not None]


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
