"""What the proof that a cache rewinds is a proof of: the precision and the attention that will decode."""

import functools

import families
import pytest
import torch
from regions import trainer

from vlm_sft_rl.decoding.branches import check_branching
from vlm_sft_rl.decoding.capabilities import rewind_obstacle
from vlm_sft_rl.errors import UserError


def without_autocast(pair):
    """A model with a kernel that refuses what autocast makes of its inputs."""
    model, processor = pair
    original = model.forward

    @functools.wraps(original)
    def forward(*args, **options):
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("no kernel for this precision")
        return original(*args, **options)

    model.forward = forward
    return model, processor


def test_each_precision_has_its_own_proof():
    model, _ = without_autocast(families.llava())
    assert rewind_obstacle(model) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert "no kernel for this precision" in rewind_obstacle(model)
    assert rewind_obstacle(model) is None


def test_sc_tune_proves_the_precision_of_its_run_before_the_first_step(tmp_path):
    trainer(tmp_path, pair=without_autocast(families.llava()))
    with pytest.raises(UserError, match="no kernel for this precision"):
        trainer(tmp_path, pair=without_autocast(families.llava()), bf16=True)


def test_a_kernel_that_does_not_decode_is_not_asked():
    """One that takes no ragged mask is exchanged for SDPA while decoding."""
    model, _ = families.llava()
    model.set_attn_implementation("flex_attention")
    check_branching(model)
    assert model.config._attn_implementation == "flex_attention"
