"""The machine of `rules: released` makes the decisions of the released loop, call by call."""

import hashlib
import random

from hypothesis import given, settings
from hypothesis import strategies as st
from released_oracle import CN, DOT, END, OPEN, UN, released_loop

from vlm_sft_rl.decoding.answers import CANNED_ANSWER, Grammar
from vlm_sft_rl.decoding.config import RetrospectiveConfig
from vlm_sft_rl.decoding.machines import CONTINUE, FINISH
from vlm_sft_rl.decoding.released import ReleasedRetrospective

WORDS = {
    OPEN: "<SPAN>",
    CN: "</CN>",
    UN: "</UN>",
    DOT: ".",
    END: "<end>",
    5: "Cat",
    6: "dog",
    7: "on",
    8: "two",
}


def decode(ids):
    return " ".join(WORDS[t] for t in ids)


def plain(ids):
    return " ".join(WORDS[t] for t in ids if t not in (OPEN, CN, UN))


GRAMMAR = Grammar(OPEN, CN, UN, frozenset([END]), decode, lambda t: WORDS[t], plain)


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
    calls = [(machine.insertion, (), round(machine.temperature, 6))]
    for _ in range(limit):
        token, p = next_token(machine.insertion, machine.ids, machine.temperature)
        before = machine.passes
        action = machine.observe(token, p)
        if action == FINISH:
            return calls
        if machine.passes != before and machine.passes:
            calls.append((machine.insertion, tuple(machine.ids), round(machine.temperature, 6)))
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

    expected = released_loop(
        generate, decode, plain, tau=tau, attempts=total, local=local, t0=t0, premise_always=always
    )
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
    calls = run_machine(machine, next_token)
    assert calls == expected.calls
    assert (machine.ok, machine.ids) == (expected.ok, expected.ids)
    rejected = [e["text"] for e in machine.trace if e["kind"] == "reject"]
    assert rejected == [phrase for phrase in expected.history if phrase is not None]


def test_false_premise_mode_asks_twice_and_then_refuses():
    config = RetrospectiveConfig(
        threshold=0.5, total_attempts=3, local_attempts=2, false_premise=True, rules="released"
    )
    machine = ReleasedRetrospective(config, GRAMMAR)
    script = {0: OPEN, 1: 5, 2: UN}
    insertions = set()
    while True:
        insertions.add(machine.insertion)
        if machine.observe(script[len(machine.ids)] if len(machine.ids) < 3 else END, 0.9) == FINISH:
            break
    answer = machine.answer()
    assert (answer.text, answer.ok) == (CANNED_ANSWER, False)
    assert any("false premises" in text for text in insertions)
