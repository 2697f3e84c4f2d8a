import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_sft_rl.decoding.tried import weights
from vlm_sft_rl.trainers.sc_tune.config import phase_at
from vlm_sft_rl.trainers.sc_tune.policy import (
    advantages,
    clipped_surrogate,
    distinct_baselines,
    leave_one_out,
    returns_to_go,
    token_kl,
)


def test_hand_worked_return_and_advantage():
    """Two descriptions of three and two tokens, R = 0.8 and 0.3, greedy baselines 0.5 and 0.4, coefficient 0.1."""
    old = torch.tensor([[-1.0, -2.0, -0.5], [-1.0, -1.0, 0.0]])
    reference = torch.tensor([[-1.5, -1.0, -0.5], [-3.0, -0.5, 0.0]])
    mask = torch.tensor([[1.0, 1, 1], [1, 1, 0]])
    kl = token_kl(old, reference, mask)
    assert kl.tolist() == [[0.5, -1.0, 0.0], [2.0, -0.5, 0.0]]
    returns = returns_to_go(torch.tensor([0.8, 0.3]), kl, 0.1)
    # 0.8 - 0.1 (0.5 - 1 + 0), 0.8 - 0.1 (-1 + 0), 0.8; 0.3 - 0.1 (2 - 0.5), 0.3 + 0.05, 0.3
    torch.testing.assert_close(returns, torch.tensor([[0.85, 0.9, 0.8], [0.15, 0.35, 0.3]]))
    gain = advantages(returns, torch.tensor([0.5, 0.4]), mask)
    torch.testing.assert_close(gain, torch.tensor([[0.35, 0.4, 0.3], [-0.25, -0.05, 0.0]]))


def test_a_ratio_beyond_all_numbers_leaves_a_dropped_batch_without_gradient():
    log_probs = torch.zeros(1, 2, requires_grad=True)
    found = clipped_surrogate(
        log_probs, torch.tensor([[-1000.0, 0.0]]), -torch.ones(1, 2), torch.ones(1, 2), 0.2
    )
    assert found.ratio > 1e6
    (found.loss * 0.0).backward()
    assert log_probs.grad.tolist() == [[0.0, 0.0]]


def test_hand_worked_surrogate():
    """Ratios 1.5, 0.5, 1.5, 0.5 with clip 0.2: a gain is cut at 1.2, a loss is not forgiven below 0.8."""
    ratios = torch.tensor([[1.5, 0.5, 1.5, 0.5, 3.0]])
    gain = torch.tensor([[1.0, 1.0, -1.0, -1.0, 7.0]])
    mask = torch.tensor([[1.0, 1, 1, 1, 0]])
    found = clipped_surrogate(ratios.log(), torch.zeros(1, 5), gain, mask, 0.2)
    # max(-1.5, -1.2) + max(-0.5, -0.8) + max(1.5, 1.2) + max(0.5, 0.8)
    assert found.loss.item() == pytest.approx(-1.2 - 0.5 + 1.5 + 0.8)
    assert found.clipped == 2 and found.tokens == 4
    assert found.ratio.item() == pytest.approx(4.0)
    assert found.drift.item() == pytest.approx(-2 * math.log(1.5) - 2 * math.log(0.5))


def test_clipped_tokens_have_no_gradient_and_the_first_epoch_is_reinforce():
    log_probs = torch.tensor([[math.log(1.5), math.log(0.5), 0.0]], requires_grad=True)
    gain = torch.tensor([[1.0, -1.0, 2.0]])
    clipped_surrogate(log_probs, torch.zeros(1, 3), gain, torch.ones(1, 3), 0.2).loss.backward()
    assert log_probs.grad.tolist() == [[0.0, 0.0, -2.0]]


@given(st.lists(st.floats(-1, 1), min_size=6, max_size=6), st.sampled_from([2, 3, 6]))
def test_leave_one_out_is_the_mean_of_the_others(rewards, group):
    found = leave_one_out(torch.tensor(rewards, dtype=torch.float64), group).tolist()
    for i, value in enumerate(found):
        block = [rewards[j] for j in range(i // group * group, (i // group + 1) * group) if j != i]
        assert value == pytest.approx(sum(block) / len(block))


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-3, 0), st.floats(-3, 0)), min_size=1, max_size=6), st.floats(0, 1))
def test_the_first_return_carries_all_kl_and_the_last_only_its_own(pairs, coefficient):
    old, reference = (torch.tensor([list(side)], dtype=torch.float64) for side in zip(*pairs, strict=True))
    kl = token_kl(old, reference, torch.ones_like(old))
    returns = returns_to_go(torch.tensor([0.7], dtype=torch.float64), kl, coefficient)[0]
    assert returns[0].item() == pytest.approx(0.7 - coefficient * sum(o - r for o, r in pairs))
    assert returns[-1].item() == pytest.approx(0.7 - coefficient * (pairs[-1][0] - pairs[-1][1]))


def chance(law: list[float], order: tuple[int, ...]) -> float:
    """Of drawing `order`, one behind the other without replacement."""
    result, left = 1.0, sum(law)
    for i in order:
        result, left = result * law[i] / left, left - law[i]
    return result


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.01, 1), st.floats(-1, 1)), min_size=2, max_size=6),
    st.integers(2, 4),
    st.sampled_from(["none", "constant", "group"]),
)
def test_draws_without_replacement_estimate_the_gradient_without_bias(pairs, count, baseline):
    """Every order that can be drawn, with its probability: the mean of the estimates is the gradient by the law's logits."""
    masses, rewards = (torch.tensor(side, dtype=torch.float64) for side in zip(*pairs, strict=True))
    law, count = (masses / masses.sum()).tolist(), min(count, len(pairs))
    logits = torch.tensor(law, dtype=torch.float64).log().requires_grad_()
    (expected,) = torch.autograd.grad((logits.softmax(0) * rewards).sum(), logits)
    # d log p_s / d logits
    scores = torch.eye(len(law), dtype=torch.float64) - torch.tensor(law, dtype=torch.float64)
    mean = torch.zeros(len(law), dtype=torch.float64)
    for order in permutations(range(len(law)), count):
        drawn, probabilities = list(order), [law[i] for i in order]
        shares = torch.tensor(weights(probabilities), dtype=torch.float64)
        off = {"none": 0.0, "constant": 0.3}.get(baseline)
        if off is None:
            off = distinct_baselines(rewards[drawn], probabilities)
        mean += chance(law, order) * ((shares * (rewards[drawn] - off)) @ scores[drawn])
    torch.testing.assert_close(mean, expected, atol=1e-7, rtol=1e-6)


@settings(deadline=None)
@given(st.lists(st.floats(1e-3, 1), min_size=4, max_size=7), st.integers(2, 4))
def test_a_draw_is_weighed_and_measured_by_the_orders_it_may_have_come_in(masses, count):
    law = [mass / sum(masses) for mass in masses]
    shares = weights(law[:count])
    orders = {order: chance(law, order) for order in permutations(range(count))}
    rewards = torch.arange(count, dtype=torch.float64)
    baselines = distinct_baselines(rewards, law[:count])
    for first in range(count):
        begun = {order: p for order, p in orders.items() if order[0] == first}
        assert shares[first] == pytest.approx(sum(begun.values()) / sum(orders.values()), abs=1e-7)
        second = sum(p * order[1] for order, p in begun.items()) / sum(begun.values())
        assert baselines[first].item() == pytest.approx(
            law[first] * first + (1 - law[first]) * second, abs=1e-6
        )


def test_improbable_draws_are_as_if_independent_and_equal_rewards_give_no_advantage():
    rewards = torch.linspace(0.1, 0.9, 8)
    torch.testing.assert_close(distinct_baselines(rewards, [1e-170] * 8), leave_one_out(rewards, 8))
    equal = torch.full((8,), 0.3)
    assert torch.equal(distinct_baselines(equal, [0.5**k for k in range(1, 9)]), equal)


def test_the_only_description_there_is_has_no_advantage():
    assert torch.equal(distinct_baselines(torch.tensor([0.7]), [1.0]), torch.tensor([0.7]))


def test_phases_as_published():
    assert [phase_at(step, 200, 100) for step in (0, 199, 200, 299, 300, 1799)] == [
        ("describer", 0),
        ("describer", 199),
        ("locator", 0),
        ("locator", 99),
        ("describer", 0),
        ("locator", 99),
    ]
    assert phase_at(25, 10, 0) == ("describer", 5) and phase_at(25, 0, 10) == ("locator", 5)
