import os

import families
import pytest
from huggingface_hub import ModelCard
from tagged_rows import prepared
from training import loaded_trainer, moved, weights

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.models.checkpoints import save_model
from vlm_sft_rl.models.load import restore_weights
from vlm_sft_rl.models.tokens import is_tied


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("tie", [False, True])
def test_restored_weights_are_the_saved_ones(tmp_path, family, tie):
    saved, processor = getattr(families, family)(tie=tie, seed=0)
    families.save(saved, processor, tmp_path)
    model, _ = getattr(families, family)(tie=tie, seed=1)
    parameters = list(model.parameters())
    restore_weights(model, tmp_path)
    assert not moved(weights(saved), model) and is_tied(model) == tie
    # the optimizer holds these
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


def test_another_model_is_refused(tmp_path):
    families.save(*families.llava(layers=3), tmp_path)
    with pytest.raises(UserError, match="another model"):
        restore_weights(families.llava()[0], tmp_path)


def test_the_name_of_a_folder_is_no_html_in_its_card(tmp_path):
    trainer, _ = loaded_trainer(prepared(tmp_path), tmp_path)
    trainer.create_model_card(model_name="<img src=x>[a](b)")
    text = (tmp_path / "out" / "README.md").read_text()
    assert r"&lt;img src=x&gt;\[a\](b)" in text and "<img" not in text


def test_the_tags_of_a_card_stand_in_one_order(tmp_path):
    trainer, _ = loaded_trainer(prepared(tmp_path), tmp_path)
    trainer.create_model_card(tags=["z", "b", "reverse", "a", "y"])
    tags = ModelCard.load(tmp_path / "out" / "README.md").data.tags
    assert tags == sorted(tags) and {"a", "trl", "z"} <= set(tags)


def test_a_run_killed_behind_its_last_step_is_not_trained_further(tmp_path):
    """Inside of an epoch: three steps of four."""
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    base = prepared(tmp_path)
    trainer, _ = loaded_trainer(base, tmp_path, training=settings)
    trainer.train()
    again, _ = loaded_trainer(base, tmp_path, training=settings)
    again.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-3"))
    assert again.state.global_step == 3
    assert not moved(weights(trainer.model), again.model)


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o077, 0o600)])
def test_weights_have_the_mode_that_the_user_wants(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        trainer, _ = loaded_trainer(prepared(tmp_path), tmp_path)
        trainer.save_model(str(tmp_path / "saved"))
        save_model(*families.llava(), tmp_path / "model")
    finally:
        os.umask(before)
    for folder in ("saved", "model"):
        files = list((tmp_path / folder).iterdir())
        assert {path.stat().st_mode & 0o777 for path in files} == {mode}
        assert any(path.suffix == ".safetensors" for path in files)
