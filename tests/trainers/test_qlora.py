"""QLoRA for real: 4-bit and 8-bit weights, LoRA, projector and new rows in full precision, merge, reload."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from tagged_rows import prepared
from tiny_training import trainer_for

from vlm_sft_rl.models.checkpoints import merge
from vlm_sft_rl.models.parts import LANGUAGE, part_of

QUANTISED = (Linear4bit, Linear8bitLt)


def trained(folder, family: str, **model_args):
    settings = {"use_peft": True, "lora_r": 4, "bnb_4bit_quant_type": "nf4", **model_args}
    trainer, _ = trainer_for(prepared(folder, family), folder, **settings)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {
        name
        for name, value in trainer.model.named_parameters()
        if not torch.equal(before[name], value.detach())
    }
    trainer.save_model()
    return trainer, moved


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "smolvlm"])
def test_only_the_language_model_is_quantised_and_only_small_parts_move(tmp_path, family, bits):
    trainer, moved = trained(tmp_path, family, **{bits: True})
    model = trainer.model.get_base_model()
    parts = {part_of(name) for name, module in model.named_modules() if isinstance(module, QUANTISED)}
    assert parts == {LANGUAGE}
    kinds = {
        kind for kind in ("lora_", "modules_to_save", "token_adapter") if any(kind in name for name in moved)
    }
    assert kinds == {"lora_", "modules_to_save", "token_adapter"}
    assert all(any(kind in name for kind in kinds) for name in moved)
    figures = merge(tmp_path / "out", tmp_path / "merged")
    assert figures.effect > 1e-3 and figures.error < 1e-5


@pytest.mark.parametrize(
    "dtype, bf16, kept",
    [
        ("float32", False, torch.float32),
        ("bfloat16", True, torch.float32),
        ("bfloat16", False, torch.bfloat16),
    ],
)
def test_what_trains_beside_quantised_weights_is_float32_where_it_can_be(tmp_path, dtype, bf16, kept):
    """TRL rounds it to bfloat16, where rows and LoRA's A stand still at usual learning rates."""
    settings = {"use_peft": True, "lora_r": 4, "bnb_4bit_quant_type": "nf4", "load_in_4bit": True}
    training = {"bf16": bf16, "max_steps": 1}
    trainer, _ = trainer_for(
        prepared(tmp_path, "llava"), tmp_path, training=training, dtype=dtype, **settings
    )
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {kept}
    trainer.train()
