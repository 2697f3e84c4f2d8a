"""Prepare, train with LoRA, merge: one pass through every family's real classes."""

import pytest
from datasets import Dataset
from tagged_rows import prepared, write_rows

from vlm_sft_rl.data.rows import read_rows
from vlm_sft_rl.models.config import VLMModelConfig
from vlm_sft_rl.models.load import load_for_training
from vlm_sft_rl.models.merge import merge
from vlm_sft_rl.models.peft import build_peft_config
from vlm_sft_rl.models.report import startup_report
from vlm_sft_rl.trainers.verification_config import VerificationSFTConfig
from vlm_sft_rl.trainers.verification_sft import VerificationSFTTrainer, build_collator


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl", "idefics3", "smolvlm", "llava_mistral"])
def test_prepare_train_merge(tmp_path, family):
    dataset = Dataset.from_list(list(read_rows(write_rows(tmp_path / "data"))))
    args = VLMModelConfig(model_name_or_path=str(prepared(tmp_path, family)), use_peft=True, lora_r=4)
    model, processor, ids, _ = load_for_training(args)
    config = VerificationSFTConfig(
        str(tmp_path / "out"),
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
        data_collator=build_collator(processor, config, image_root=tmp_path / "data"),
        train_dataset=dataset,
        processing_class=processor,
        peft_config=build_peft_config(model, args, ids),
    )
    report = startup_report(trainer.model, processor, dataset, trainer.data_collator, rows=2)
    assert report["image_tokens"] > 0 and set(map(tuple, report["token_rows"].values())) == {tuple(ids)}
    assert all(report["parameters"][part]["trainable"] > 0 for part in ("projector", "language"))
    assert report["parameters"]["vision"]["trainable"] == 0
    trainer.train()
    trainer.save_model()
    figures = merge(config.output_dir, tmp_path / "merged")
    assert figures.effect > 1e-3 and figures.error < 1e-5
