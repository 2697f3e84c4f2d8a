"""Drawing without replacement against enumeration: a model over a small vocabulary, every answer listed."""

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_sft_rl.decoding.machines import Machine
from vlm_sft_rl.decoding.sampling import Sampler, Sampling
from vlm_sft_rl.decoding.tried import Tried

SIZE, LENGTH, ENDS = 5, 3, (0, 1)  # tokens, longest answer, what ends one


class Model:
    """Logits behind every prefix."""

    def __init__(self, seed, spread, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        prefixes = [p for n in range(LENGTH) for p in itertools.product(range(SIZE), repeat=n)]
        table = spread * torch.randn(len(prefixes), SIZE, generator=generator)
        self.rows = dict(zip(prefixes, table.to(dtype), strict=True))

    def logits(self, prefix):
        """At the last place only an end can follow."""
        row = self.rows[prefix].clone()
        if len(prefix) == LENGTH - 1:
            row[len(ENDS) :] = -torch.inf
        return row

    def answers(self, temperature):
        """Answer -> probability; all ends of one text are one answer."""
        law = {}

        def follow(prefix, p):
            probabilities = (self.logits(prefix).double() / temperature).softmax(-1).tolist()
            law[prefix] = p * sum(probabilities[token] for token in ENDS)
            if len(prefix) < LENGTH - 1:
                for token in range(len(ENDS), SIZE):
                    follow((*prefix, token), p * probabilities[token])

        follow((), 1.0)
        return law


class Row(Machine):
    """A place in the model with what was tried there."""

    def __init__(self, temperature, law_temperature=None, least=0.0):
        self.temperature, self.law_temperature = temperature, law_temperature or temperature
        self.tried = Tried([ENDS], least)


def biased_law(model, row, prefix):
    """The probabilities that the sampler draws the next token with."""
    logits = model.logits(prefix).double()
    for token, bias in row.logit_bias().items():
        logits[token] += bias
    return (logits / row.temperature).softmax(-1)


def weigh(model, row, prefix, token):
    wanted = row.tried.to_weigh(token)
    law = Sampler().law(model.logits(prefix).unsqueeze(0), [row.law_temperature], [wanted])
    row.tried.weigh(wanted, law.tolist)


def walk(model, row, answer, end=ENDS[0]):
    """Draw `answer` and reject it; returns the probability of drawing it."""
    p, prefix = 1.0, ()
    for token in answer:
        p *= float(biased_law(model, row, prefix)[token])
        weigh(model, row, prefix, token)
        row.tried.step(token)
        prefix = (*prefix, token)
    p *= float(biased_law(model, row, prefix)[list(ENDS)].sum())
    weigh(model, row, prefix, end)
    row.probability = row.tried.probability(end)
    row.tried.reject(end)
    row.tried.back(0)
    return p


MODELS = {"seed": st.integers(0, 10**6), "spread": st.sampled_from([0.3, 1.0, 2.0])}


@settings(max_examples=60, deadline=None)
@given(**MODELS, temperature=st.sampled_from([0.5, 1.0, 1.7]), order=st.randoms(use_true_random=False))
def test_each_draw_has_the_law_of_the_answers_that_are_left(seed, spread, temperature, order):
    model = Model(seed, spread)
    law = model.answers(temperature)
    assert sum(law.values()) == pytest.approx(1)
    answers = list(law)
    order.shuffle(answers)
    for k in range(6):
        row, mass = Row(temperature), 0.0
        for answer in answers[:k]:
            walk(model, row, answer, order.choice(ENDS))
            mass += law[answer]
        assert row.tried.path[0].tried == pytest.approx(mass, abs=1e-5)
        if mass < 0.999:
            answer = answers[k]
            expected = law[answer] / (1 - mass)
            assert walk(model, row, answer) == pytest.approx(expected, rel=1e-3, abs=1e-6)
            # of the earlier draws it does not know
            assert row.probability == pytest.approx(law[answer], rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(**MODELS, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), greedy=st.booleans())
def test_every_draw_is_new_until_all_are_drawn(seed, spread, dtype, greedy):
    model, rng = Model(seed, spread, dtype), random.Random(seed)
    law = model.answers(1.0)
    row, sampler, drawn = Row(0.0 if greedy else 1.0, 1.0), Sampler(), []
    while not row.tried.exhausted(0):
        prefix = ()
        while True:
            logits = model.logits(prefix).unsqueeze(0)
            (token,) = sampler.choose(logits, [Sampling(row.temperature, rng, logit_bias=row.logit_bias())])
            weigh(model, row, prefix, token)
            if token in ENDS:
                break
            row.tried.step(token)
            prefix = (*prefix, token)
        row.tried.reject(token)
        row.tried.back(0)
        drawn.append(prefix)
    assert len(set(drawn)) == len(drawn)
    # what was left out is rounding
    assert sum(law[answer] for answer in law if answer not in set(drawn)) < 1e-4


def test_the_first_draw_keeps_its_law_whatever_was_drawn_elsewhere():
    model, row = Model(0, 1.0), Row(1.0)
    assert row.logit_bias() == {}
    walk(model, row, (2,))
    row.tried.step(3)
    assert row.logit_bias() == {}


def test_probabilities_of_the_law_leave_suppressed_tokens_out():
    logits = torch.tensor([[1.0, 2.0, 3.0, 9.0]])
    law = Sampler(suppress=[3]).law(logits, [2.0], [[0, 1, 2]])
    assert law.tolist() == pytest.approx((logits[0, :3] / 2).softmax(-1).tolist())
    assert logits[0, 3] == 9


@pytest.mark.parametrize("wanted", [[[1], [4]], [[1, 0], [4]], [[], [2, 3]]])
@pytest.mark.parametrize("options", [{}, {"suppress": [0]}, {"top_k": 3}, {"top_p": 0.8}])
def test_the_law_is_that_of_the_draws(wanted, options):
    sampler, temperatures = Sampler(**options), [1.0, 0.5]
    logits = torch.randn(2, 6, generator=torch.Generator().manual_seed(3))
    law = iter(sampler.law(logits, temperatures, wanted).tolist())
    uniforms = [(k + 0.5) / 4000 for k in range(4000)]
    for i, tokens in enumerate(wanted):
        drawn = sampler.sample(logits[i : i + 1].expand(4000, -1), temperatures[i : i + 1] * 4000, uniforms)
        for token in tokens:
            assert next(law) == pytest.approx(drawn.count(token) / 4000, abs=1e-3)
    assert next(law, None) is None


def test_probabilities_are_fetched_where_something_is_rejected_and_not_before():
    tried, fetched = Tried([ENDS]), []

    def give(probabilities):
        fetched.append(probabilities)
        return probabilities

    for _ in range(3):
        tried.weigh([2], lambda: give([0.5]))
        tried.step(2)
    assert tried.untried() == {} and not tried.exhausted(0) and not fetched
    tried.weigh(ENDS, lambda: give([0.25] * len(ENDS)))
    tried.reject(ENDS[0])
    assert len(fetched) == 4 and tried.path[0].tried == pytest.approx(0.5**3 * 0.25 * len(ENDS))


def test_a_walk_through_another_distribution_weighs_its_steps_anew():
    first, second, row = Model(1, 1.0), Model(2, 1.0), Row(1.0)
    walk(first, row, (2, 3))
    walk(second, row, (2, 4))
    (p,) = Sampler().law(second.logits(()).unsqueeze(0), [1.0], [[2]]).tolist()
    assert row.tried.path[0].children[2].probability == pytest.approx(p)
    # the rejected ones stay out
    assert biased_law(second, row, (2, 3)).isfinite().all()
    row.tried.step(2)
    row.tried.step(3)
    assert all(row.logit_bias()[token] == -float("inf") for token in ENDS)


def test_what_is_left_below_the_floor_where_a_phrase_was_complete_is_tried_too():
    def rest(least, complete):
        row = Row(1.0, least=least)
        row.tried.weigh([2, 3], lambda: [0.9, 0.1])
        row.tried.step(2)
        row.tried.weigh([0, 1], lambda: [0.5, 0.45])
        row.tried.reject(1, complete)
        return 1 - row.tried.path[0].tried

    assert rest(0.0, 1) == pytest.approx(1 - 0.9 * 0.95)
    assert rest(0.06, 1) == pytest.approx(0.1)
    assert rest(0.06, 2) == pytest.approx(0.1)  # a tenth of the first place is above the floor
    assert rest(0.2, 2) == 0


def test_branches_share_what_was_tried_and_have_places_of_their_own():
    tried = Tried([ENDS])
    tried.step(2)
    branch = tried.branch()
    branch.weigh([3], lambda: [0.5])
    branch.step(3)
    branch.reject(0)
    assert tried.seen([3, 0]) and tried.seen([3, 1]) and not tried.seen([3, 2])
    assert len(tried.path) == 2
