"""QLoRA for real: 4-bit and 8-bit weights, LoRA, projector and new rows in full precision, merge, reload."""

import pytest
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from tagged_rows import prepared
from training import loaded_trainer, moved, weights

from vlm_sft_rl.models.checkpoints import merge
from vlm_sft_rl.models.parts import LANGUAGE, part_of

SMALL_PARTS = ("lora_", "modules_to_save", "token_adapter")


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "smolvlm"])
def test_only_the_language_model_is_quantised_and_only_small_parts_move(tmp_path, family, bits):
    settings = {"use_peft": True, "lora_r": 4, "bnb_4bit_quant_type": "nf4", bits: True}
    trainer, _ = loaded_trainer(prepared(tmp_path, family), tmp_path, **settings)
    before = weights(trainer.model)
    trainer.train()
    trainer.save_model()
    modules = trainer.plain_model.named_modules()
    assert {part_of(name) for name, m in modules if isinstance(m, Linear4bit | Linear8bitLt)} == {LANGUAGE}
    changed = moved(before, trainer.model)
    assert all(any(part in name for name in changed) for part in SMALL_PARTS)
    assert all(any(part in name for part in SMALL_PARTS) for name in changed)
    figures = merge(tmp_path / "out", tmp_path / "merged")
    assert figures.effect > 1e-3 and figures.error < 1e-5
