"""QLoRA for real: 4-bit and 8-bit weights, LoRA, projector and new rows in full precision, merge, reload."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from datasets import Dataset
from tagged_rows import prepared, write_rows

from vlm_sft_rl.data.rows import read_rows
from vlm_sft_rl.models.config import VLMModelConfig
from vlm_sft_rl.models.freeze import LANGUAGE, part_of
from vlm_sft_rl.models.load import load_for_training
from vlm_sft_rl.models.merge import merge
from vlm_sft_rl.models.peft import build_peft_config
from vlm_sft_rl.trainers.verification_config import VerificationSFTConfig
from vlm_sft_rl.trainers.verification_sft import VerificationSFTTrainer, build_collator

QUANTISED = (Linear4bit, Linear8bitLt)


def trained(folder, family: str, **model_args):
    dataset = Dataset.from_list(list(read_rows(write_rows(folder / "data"))))
    args = VLMModelConfig(
        model_name_or_path=str(prepared(folder, family)),
        use_peft=True,
        lora_r=4,
        bnb_4bit_quant_type="nf4",
        **model_args,
    )
    model, processor, ids, _ = load_for_training(args)
    config = VerificationSFTConfig(
        str(folder / "out"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = VerificationSFTTrainer(
        model,
        config,
        data_collator=build_collator(processor, config, image_root=folder / "data"),
        train_dataset=dataset,
        processing_class=processor,
        peft_config=build_peft_config(model, args, ids),
    )
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
