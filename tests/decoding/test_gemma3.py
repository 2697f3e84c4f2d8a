"""Gemma 3 mixes windows of two kinds and lets image tokens see each other: it rewinds, and that is proved here."""

from functools import partial

import families
import pytest
import test_engine

from vlm_sft_rl.decoding.cache import RewindBackend, layer_windows
from vlm_sft_rl.decoding.capabilities import choose_backend, rewind_obstacle
from vlm_sft_rl.decoding.config import RetrospectiveConfig


@pytest.fixture
def sharp(monkeypatch):
    def make(window):
        monkeypatch.setattr(families, "gemma3", partial(families.gemma3, window=window))
        return test_engine.sharp("gemma3")

    return make


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [12, 512])
def test_every_sampled_distribution_equals_a_full_recompute(sharp, window, attention):
    model, processor = sharp(window)
    model.set_attn_implementation(attention)
    assert layer_windows(model) == [window, window, None] and rewind_obstacle(model) is None
    assert isinstance(choose_backend(model), RewindBackend)
    config = RetrospectiveConfig(threshold=0.5, local_attempts=3, total_attempts=12, max_new_tokens=60)
    answers, seen = test_engine.run_scripted(model, processor, config, batch_size=3)
    kinds = {event["kind"] for answer in answers for event in answer.trace}
    assert {"accept", "reject", "local_rewind", "sentence_rewind", "hint", "finish"} <= kinds
    difference, scale = test_engine.worst_difference(model, processor, seen)
    assert scale > 2 and difference < 1e-4
