import families
import pytest
import torch
from training import moved, trainable, weights

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.models.parts import set_trainable
from vlm_sft_rl.trainers.sc_tune.frozen import FrozenCopy


@pytest.fixture
def model():
    model, _ = families.llava()
    set_trainable(model, vision=False, projector=True, language=True)
    return model


def test_only_trained_tensors_are_copied_and_the_exchange_is_undone(model):
    start = weights(model)
    copy = FrozenCopy(model)
    assert copy.names == trainable(model) and not any("vision" in name for name in copy.names)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(1.0)
            p.grad = torch.ones_like(p)
    live, pointers = weights(model), {name: p.data_ptr() for name, p in model.named_parameters()}
    with pytest.raises(KeyError), copy.active():
        assert not moved(start, model)
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        raise KeyError  # an error on the way must not leave the copy in place
    assert not moved(live, model)
    assert pointers == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert not copy.equals_live()
    copy.refresh()
    assert copy.equals_live()
    with copy.active():
        assert not moved(live, model)


def test_under_autocast_it_computes_with_its_own_weights(model):
    copy = FrozenCopy(model)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        start = model(**inputs).logits
    for p in model.parameters():
        if p.requires_grad:
            p.data.mul_(1.5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        live = model(**inputs).logits
        with copy.active():
            assert torch.equal(model(**inputs).logits, start)
        assert torch.equal(model(**inputs).logits, live) and not torch.equal(live, start)


def test_tied_embeddings_stay_tied():
    model, _ = families.llava(tie=True)
    copy = FrozenCopy(model)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    with copy.active():
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        before = model.get_output_embeddings().weight.detach().clone()
    assert torch.allclose(model.get_output_embeddings().weight.detach(), before + 1)


def test_saved_and_read_back(model, tmp_path):
    copy = FrozenCopy(model)
    copy.save(tmp_path / "frozen.safetensors")
    start = weights(model)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(1.0)
    other = FrozenCopy(model)
    assert other.equals_live()
    other.load(tmp_path / "frozen.safetensors")
    assert not other.equals_live()
    with other.active():
        assert not moved(start, model)
    set_trainable(model, vision=False, projector=False, language=True)
    with pytest.raises(UserError, match="trains other weights"):
        FrozenCopy(model).load(tmp_path / "frozen.safetensors")
    with pytest.raises(UserError, match="save_only_model"):
        other.load(tmp_path / "gone.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"damaged.*earlier checkpoint"):
        other.load(tmp_path / "torn.safetensors")


def test_it_cannot_be_changed_while_in_use(model):
    copy = FrozenCopy(model)
    with copy.active(), pytest.raises(RuntimeError):
        copy.refresh()
