"""Which models rewind, and what the proof is a proof of: the precision and the attention that will decode."""

import functools

import families
import pytest
import torch
from decoded import sharp
from regions import trainer

from vlm_sft_rl.decoding.branches import check_branching
from vlm_sft_rl.decoding.cache import RecomputeBackend, RewindBackend, layer_windows
from vlm_sft_rl.decoding.capabilities import (
    choose_backend,
    rewind_obstacle,
    sharing_obstacle,
    structural_obstacle,
)
from vlm_sft_rl.decoding.shared_prefix import SharedPrefixBackend
from vlm_sft_rl.errors import UserError


def with_forward(pair, change):
    """A model whose forward is `change(original, *args, **options)`; `generate` still reads the signature."""
    model, processor = pair
    original = model.forward
    model.forward = functools.wraps(original)(lambda *args, **options: change(original, *args, **options))
    return model, processor


def no_autocast(original, *args, **options):
    if torch.is_autocast_enabled("cpu"):
        raise RuntimeError("no kernel for this precision")
    return original(*args, **options)


def ignore_positions(original, *args, position_ids=None, **options):
    return original(*args, **options)


def fill_holes(original, *args, attention_mask=None, **options):
    if attention_mask is not None and attention_mask.ndim == 4:
        attention_mask = attention_mask.flip(-1).cummax(-1).values.flip(-1)
    return original(*args, attention_mask=attention_mask, **options)


def test_each_precision_has_its_own_proof():
    model, _ = with_forward(families.llava(), no_autocast)
    assert rewind_obstacle(model) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert "no kernel for this precision" in rewind_obstacle(model)
    assert rewind_obstacle(model) is None


def test_sc_tune_proves_the_precision_of_its_run_before_the_first_step(tmp_path):
    trainer(tmp_path, pair=with_forward(families.llava(), no_autocast))
    with pytest.raises(UserError, match="no kernel for this precision"):
        trainer(tmp_path, pair=with_forward(families.llava(), no_autocast), bf16=True)


def test_a_kernel_that_does_not_decode_is_not_asked():
    """One that takes no ragged mask is exchanged for SDPA while decoding."""
    model, _ = families.llava()
    model.set_attn_implementation("flex_attention")
    check_branching(model)
    assert model.config._attn_implementation == "flex_attention"


def test_a_family_that_cannot_rewind_is_named():
    model, _ = families.paligemma()
    assert "both directions" in structural_obstacle(model)
    with pytest.raises(UserError, match="both directions"):
        check_branching(model)
    assert isinstance(choose_backend(model, 2), RecomputeBackend)


def test_the_self_tests_see_a_release_that_does_otherwise():
    model, _ = with_forward(sharp("llava"), ignore_positions)
    assert "self-test" in rewind_obstacle(model)
    # rewinding does without masks that have holes
    model, _ = with_forward(sharp("llava"), fill_holes)
    assert rewind_obstacle(model) is None and "logits differ" in sharing_obstacle(model)
    assert isinstance(choose_backend(model, 2), RewindBackend)
    model, _ = sharp("llava")
    assert sharing_obstacle(model) is None
    assert isinstance(choose_backend(model, 2), SharedPrefixBackend)


@pytest.mark.parametrize("window", [12, 512])
def test_windows_of_gemma_3_are_of_two_kinds(window):
    assert layer_windows(families.gemma3(window=window)[0]) == [window, window, None]
