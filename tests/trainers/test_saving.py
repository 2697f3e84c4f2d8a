import families
import pytest
import torch

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
