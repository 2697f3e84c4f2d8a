import families
import pytest
import torch
from tagged_rows import prepared
from tiny_training import trainer_for

from vlm_sft_rl.errors import UserError
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
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved.state_dict()[name]), name
    assert is_tied(model) == tie
    assert all(
        a is b for a, b in zip(parameters, model.parameters(), strict=True)
    )  # the optimizer holds these


def test_another_model_is_refused(tmp_path):
    families.save(*families.llava(layers=3), tmp_path)
    with pytest.raises(UserError, match="another model"):
        restore_weights(families.llava()[0], tmp_path)


def test_a_run_killed_behind_its_last_step_is_not_trained_further(tmp_path):
    """Inside of an epoch: three steps of four."""
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    model = prepared(tmp_path, "llava")
    trainer, _ = trainer_for(model, tmp_path, training=settings)
    trainer.train()
    whole = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer, _ = trainer_for(model, tmp_path, training=settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-3"))
    assert trainer.state.global_step == 3
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, whole[name]), name
