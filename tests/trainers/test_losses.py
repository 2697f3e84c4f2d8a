import families
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.utils import add_fused_lm_head

from vlm_sft_rl.trainers.losses import (
    next_token_log_probs,
    scale_logits,
    unconfident_probabilities,
    weighted_nll,
)


class TextConfig:
    def __init__(self, **settings):
        self.__dict__.update(settings)


def test_weighted_nll_against_a_loop():
    torch.manual_seed(0)
    log_probs, weights = -torch.rand(3, 5, dtype=torch.double), torch.rand(3, 5, dtype=torch.double)
    total = sum(-log_probs[i, j].item() * weights[i, j].item() for i in range(3) for j in range(5))
    assert abs(weighted_nll(log_probs, weights, 7).item() - total / 7) < 1e-12
    assert weighted_nll(log_probs * 0, weights, 0).item() == 0


FACTORS = [
    ({}, 1),
    ({"logit_scale": 0.25}, 0.25),
    ({"output_multiplier": 0.5, "final_logit_softcapping": 3.0}, 0.5),
    ({"logits_scaling": 4.0}, 0.25),
    ({"logits_scaling": 4.0, "model_type": "hyperclovax"}, 4.0),
]


@pytest.mark.parametrize(("settings", "factor"), FACTORS)
def test_logits_are_scaled_as_trl_scales_them(settings, factor):
    model = families.llava()[0]
    for name, value in settings.items():
        setattr(model.config.get_text_config(), name, value)
    cap = settings.get("final_logit_softcapping")
    raw = torch.randn(4)
    expected = factor * raw if cap is None else cap * torch.tanh(factor * raw / cap)
    assert torch.equal(scale_logits(raw, model.config.get_text_config()), expected)
    add_fused_lm_head(model)
    ids = torch.arange(5, 11)[None]
    fused = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    states = model.base_model(input_ids=ids).last_hidden_state[:, :-1]
    ours = next_token_log_probs(model, states).gather(-1, ids[:, 1:, None]).squeeze(-1)
    assert torch.allclose(ours, fused, atol=1e-5)


@given(
    st.sampled_from([{}, {"final_logit_softcapping": 3.0}, {"logit_scale": 0.25}, {"logits_scaling": 4.0}])
)
def test_probabilities_equal_a_full_softmax(settings):
    torch.manual_seed(1)
    config, vocabulary, ids = TextConfig(**settings), 20, (17, 18)
    hidden, head = torch.randn(2, 6, 8), torch.randn(vocabulary, 8)
    labels = torch.tensor([[3, 17, -100, 18, 17, 4], [18, -100, 17, 2, 18, -100]])
    full = scale_logits(hidden @ head.T, config).log_softmax(-1)
    log_probs = full.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(labels == -100, 0)
    p, truth, right = unconfident_probabilities(log_probs, labels, hidden, head[list(ids)], ids, config)
    at = (labels == 17) | (labels == 18)
    assert torch.allclose(p, full[at][:, 18].exp(), atol=1e-6)
    assert torch.equal(truth, labels[at] == 18)
    assert torch.equal(right, (full[at][:, 18] > full[at][:, 17]) == truth)


def test_no_closing_tag_gives_empty_tensors():
    labels = torch.full((2, 4), -100)
    p, truth, right = unconfident_probabilities(
        torch.zeros(2, 4), labels, torch.zeros(2, 4, 3), torch.zeros(2, 3), (5, 6)
    )
    assert len(p) == len(truth) == len(right) == 0


def test_autocast_does_not_round_the_gap_of_two_close_logits():
    torch.manual_seed(2)
    hidden, ids = 3 * torch.randn(1, 50, 64), (17, 18)
    rows = torch.randn(2, 64)
    rows[1] = rows[0] + 0.001 * torch.randn(64)
    labels = torch.full((1, 50), 17)
    found = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(unconfident_probabilities(torch.zeros(1, 50) - 1, labels, hidden, rows, ids))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][2], found[1][2])
