"""`peft_config=LoraConfig(…)` as a notebook gives it: the rows of the verification tokens train, and that is said."""

import copy
import logging

import families
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from regions import config, region_rows
from tagged_rows import prepared
from training import loaded_trainer, tagged, tagged_dataset, trainable, trainer_of

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.models.load import load_adapter
from vlm_sft_rl.models.lora import frozen_rows, with_token_rows
from vlm_sft_rl.models.tokens import verification_token_ids
from vlm_sft_rl.trainers.sc_tune.trainer import SCTuneTrainer
from vlm_sft_rl.trainers.verification_sft import VerificationSFTTrainer

LANGUAGE = r".*language_model.*\.(q|v)_proj"


def embeddings(model) -> list[torch.Tensor]:
    plain = model.get_base_model()
    modules = plain.get_input_embeddings(), plain.get_output_embeddings()
    return [module.weight.detach().clone() for module in modules]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("from_path", [False, True])
def test_the_rows_of_the_tokens_train_and_no_others(tmp_path, caplog, family, tie, from_path):
    model = str(prepared(tmp_path, family, tie=tie)) if from_path else tagged(family, tie=tie)
    config = LoraConfig(r=2, target_modules=LANGUAGE)
    before = copy.deepcopy(config.to_dict())
    trainer = trainer_of(
        VerificationSFTTrainer,
        tmp_path,
        tagged_dataset(tmp_path),
        model,
        peft_config=config,
        learning_rate=1e-2,
    )
    ids = verification_token_ids(trainer.processing_class)
    assert frozen_rows(trainer.model, ids) == [] and config.to_dict() == before
    said = [record.getMessage() for record in caplog.records if "trains no rows" in record.getMessage()]
    assert len(said) == 1 and str(ids) in said[0]
    others = {n for n in trainable(trainer.model) if "lora_" not in n and "trainable_tokens" not in n}
    assert not others
    old = embeddings(trainer.model)
    trainer.train()
    for then, now in zip(old, embeddings(trainer.model), strict=True):
        assert (then != now).any(dim=1).nonzero().flatten().tolist() == ids


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": [7, 8]},
        {"trainable_token_indices": {"embed_tokens": [7]}},
        {"trainable_token_indices": {}},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ],
)
def test_what_the_user_says_of_embeddings_counts(settings):
    model, processor = tagged()
    config = LoraConfig(**({"r": 2, "target_modules": LANGUAGE} | settings))
    assert with_token_rows(model, config, verification_token_ids(processor)) is config
    assert with_token_rows(model, None, [1]) is None


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            LoraConfig(r=2, target_modules=LANGUAGE, modules_to_save=["heads"]),
            "names heads, and Llava.* no such module",
        ),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "every row longer than its labels"),
    ],
)
def test_settings_that_do_nothing_are_refused(tmp_path, config, reason):
    with pytest.raises(UserError, match=reason):
        trainer_of(VerificationSFTTrainer, tmp_path, tagged_dataset(tmp_path), tagged(), peft_config=config)


def test_a_recipe_may_leave_the_rows_alone(tmp_path, caplog):
    trainer, _ = loaded_trainer(prepared(tmp_path), tmp_path, use_peft=True, lora_r=2, train_new_tokens=False)
    assert not any("trainable_tokens" in name for name in trainable(trainer.model))
    assert "do not train in" in caplog.text and "trains no rows" not in caplog.text
    trainer.train()
    trainer.save_model()
    load_adapter(trainer.args.output_dir)


def test_rows_that_stay_frozen_are_said(tmp_path, caplog):
    model, processor = tagged()
    config = LoraConfig(r=2, target_modules=LANGUAGE)
    pair = get_peft_model(model, config), processor
    trainer = trainer_of(VerificationSFTTrainer, tmp_path, tagged_dataset(tmp_path), pair)
    names = frozen_rows(trainer.model, verification_token_ids(processor))
    assert sorted(name.split(".")[-1] for name in names) == ["embed_tokens", "lm_head"]
    assert any(
        "do not train in" in record.getMessage()
        for record in caplog.records
        if record.levelno == logging.WARNING
    )
    saved = get_peft_model(
        tagged()[0], LoraConfig(r=2, target_modules=LANGUAGE, modules_to_save=["embed_tokens"])
    )
    assert [name.split(".")[-1] for name in frozen_rows(saved, [1, 2, 3])] == ["lm_head"]


def test_a_path_with_parts_of_the_weights_is_refused(tmp_path):
    folder = prepared(tmp_path)
    families.save(*families.llava(layers=1), tmp_path / "small")
    (folder / "model.safetensors").write_bytes((tmp_path / "small" / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="weights are missing"):
        trainer_of(VerificationSFTTrainer, tmp_path, tagged_dataset(tmp_path), str(folder))


def test_code_of_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="trust_remote_code"):
        trainer_of(
            VerificationSFTTrainer,
            tmp_path,
            tagged_dataset(tmp_path),
            str(prepared(tmp_path)),
            model_init_kwargs={"trust_remote_code": True},
        )


def test_a_describer_that_verifies_itself_trains_the_rows_too(tmp_path):
    model, processor = tagged()
    made = SCTuneTrainer(
        model,
        config(tmp_path / "run", describer="retrospective"),
        train_dataset=region_rows(2),
        processing_class=processor,
        peft_config=LoraConfig(r=2, target_modules=LANGUAGE),
    )
    assert frozen_rows(made.model, verification_token_ids(processor)) == []
