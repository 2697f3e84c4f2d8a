"""The memory estimate: by hand, and against what a real small run holds."""

from dataclasses import replace

import pytest
import torch
from published_sizes import VICUNA, llava_config
from tagged_rows import prepared
from training import loaded_trainer
from transformers import LlamaConfig

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.models.load import VLMModelConfig
from vlm_sft_rl.models.memory import (
    STRATEGIES,
    Facts,
    facts,
    gib,
    language_backbone,
    meta_model,
    quantised_bytes,
)
from vlm_sft_rl.models.memory import estimate as estimate_on

B = 10**9
# a 3B model in full training: 3 billion weights train, 0.6 billion do not
FULL = Facts(frozen={4: B * 6 // 10}, trained={4: 3 * B}, block=B // 20, root=B // 4)
# LoRA on a 7B model in bfloat16: 0.3 billion in float32 train
LORA = Facts(frozen={2: 7 * B}, trained={4: 3 * B // 10})


def estimate(facts, strategy="ddp", gpus=1, **settings):
    return estimate_on(facts, STRATEGIES[strategy], gpus, **settings)


def gb(estimate):
    """Weights, gradients, optimizer states and working memory in billions of bytes."""
    parts = (estimate.weights, estimate.gradients, estimate.optimizer, estimate.working)
    return pytest.approx([part / 1e9 for part in parts])


@pytest.mark.parametrize(
    "name, gpus, expected",
    [
        # 3.6 x 4; 3 x 4; 3 x 8; autocast's copies 3.6 x 2
        ("ddp", 1, [14.4, 12, 24, 7.2]),
        # the same and DDP's buckets 3 x 4
        ("ddp", 8, [14.4, 12, 24, 19.2]),
        # DeepSpeed: 3.6 x 2; 3 x 2 / 8; 3 x 12 / 8
        ("zero2", 8, [7.2, 0.75, 4.5, 0]),
        # 7.2 / 8; gathered (2 x 0.05 + 0.25) x 2
        ("zero3", 8, [0.9, 0.75, 4.5, 0.7]),
        # float32 shards: 14.4 / 8; 12 / 8; 24 / 8
        ("fsdp2", 8, [1.8, 1.5, 3, 0.7]),
        ("fsdp2", 1, [14.4, 12, 24, 0]),
    ],
)
def test_full_training_by_hand(name, gpus, expected):
    assert gb(estimate(FULL, name, gpus)) == expected


def test_lora_by_hand():
    # 14 + 1.2; 1.2; 2.4, or one byte a moment; copies of the float32 part 0.6
    lora = estimate(LORA)
    assert gb(lora) == [15.2, 1.2, 2.4, 0.6] and lora.total == pytest.approx(1e9 * (15.2 + 1.2 + 2.4 + 0.6))
    assert gb(estimate(LORA, optimizer="paged_adamw_8bit")) == [15.2, 1.2, 0.6, 0.6]


def test_a_frozen_copy_is_one_more_of_what_trains_and_is_never_cut():
    for name, size in (("ddp", 4), ("zero2", 2)):  # DeepSpeed keeps what trains in bfloat16
        plain, doubled = (estimate(replace(LORA, copies=n), name, 8) for n in (0, 1))
        assert doubled.weights - plain.weights == pytest.approx(0.3e9 * size)
        assert doubled.total - plain.total == pytest.approx(doubled.weights - plain.weights)


def test_quantised_weights_by_hand():
    # 7e9 at 4 bits and a float32 per 64: 4.5 bits; nested: 4 + 8/64 + 32/16384 bits
    assert quantised_bytes(7 * B, bits=4, nested=False) == pytest.approx(3.9375e9)
    assert quantised_bytes(7 * B, bits=4, nested=True) == pytest.approx(3.611e9, abs=1e6)


def test_activations_and_head_by_hand():
    kept = {"activations": 900, "checkpoints": 100, "recomputed": 90}
    few = Facts(frozen={}, trained={2: 1}, **kept, supervised=10, vocabulary=50)
    for checkpointing, expected in ((True, (190, 900)), (False, (900, 190))):
        got = estimate(few, checkpointing=checkpointing)
        assert (got.activations, got.activations_otherwise) == expected
    assert estimate(few).working == 2 * 10 * 50 * 4
    many = Facts(frozen={}, trained={2: 1}, supervised=10**6, vocabulary=10**6, head=1000)
    assert estimate(many).working == 2 * 4096 * 32768 * 4 + 4000
    # all logits at once: 10 x 50 of them, in 2 bytes and in 4, and a gradient of 4
    assert estimate(replace(few, tiled=False)).working == 10 * 50 * (2 + 4 + 4)
    assert estimate(few, optimizer="lion_32bit").notes == ("`lion_32bit` is counted as Adam",)
    with pytest.raises(UserError, match="at least 1"):
        estimate(few, gpus=0)
    assert gib(2**30 * 1.25) == "1.2"


SETTINGS = [{}, {"use_peft": True, "lora_r": 4}, {"freeze_vision": False}, {"train_projector": False}]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "mllama"])
@pytest.mark.parametrize("settings", SETTINGS, ids=["full", "lora", "vision", "projector"])
def test_weights_gradients_and_states_are_those_of_a_real_run(tmp_path, family, settings):
    base = prepared(tmp_path, family)
    trainer, ids = loaded_trainer(base, tmp_path, **settings)
    args = VLMModelConfig(model_name_or_path=str(base), dtype="float32", **settings)
    counted = facts(meta_model(args, ids), args, 2, 64, 10, mixed_precision=False)
    got = estimate(counted, mixed_precision=False)
    assert got.weights == sum(p.nbytes for p in trainer.model.parameters())
    trainer.create_optimizer()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    trainer.compute_loss(trainer.model, batch).backward()
    trainer.optimizer.step()
    gradients = sum(p.grad.nbytes for p in trainer.model.parameters() if p.grad is not None)
    untouched = sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad and p.grad is None)
    assert got.gradients == gradients + untouched
    # a tower that trains has layers behind the features that are read: no gradient reaches them
    assert untouched == 0 or settings == {"freeze_vision": False}
    values = [v for state in trainer.optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    assert got.optimizer == sum(v.nbytes for v in values if v.ndim) + 2 * untouched


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "idefics3", "internvl"])
@pytest.mark.parametrize("lora", [False, True])
def test_activations_are_those_of_a_real_forward_pass(tmp_path, family, lora):
    base = prepared(tmp_path, family)
    settings = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.1} if lora else {}
    args = VLMModelConfig(model_name_or_path=str(base), dtype="float32", **settings)
    trainer, ids = loaded_trainer(base, tmp_path, **settings)
    counted = facts(meta_model(args, ids), args, 2, 64, 10, mixed_precision=False)
    decoder = language_backbone(trainer.model).train()
    x = torch.randn(2, 64, 32, requires_grad=True)
    weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        decoder(inputs_embeds=x, attention_mask=torch.ones(2, 64, dtype=torch.long), use_cache=False)
    real = sum(storage.nbytes() for place, storage in saved.items() if place not in weights)
    assert counted.activations == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("nested", [False, True])
def test_quantised_bytes_are_those_of_bitsandbytes(tmp_path, nested):
    base = prepared(tmp_path, "llava", hidden=128)
    settings = {"use_peft": True, "lora_r": 4, "load_in_4bit": True, "use_bnb_nested_quant": nested}
    trainer, ids = loaded_trainer(base, tmp_path, **settings)
    real = 0
    for parameter in trainer.model.parameters():
        if parameter.dtype == torch.uint8:
            real += parameter.nbytes + parameter.quant_state.absmax.nbytes
            if nested:
                real += parameter.quant_state.state2.absmax.nbytes
    args = VLMModelConfig(model_name_or_path=str(base), dtype="bfloat16", **settings)
    counted = facts(meta_model(args, ids), args, 1, 8, 1)
    assert counted.quantised_bytes == pytest.approx(real, rel=0.01)


def test_nothing_is_allocated_for_a_large_model(tmp_path):
    """LLaVA-1.5-7B by its published sizes: 7.06 billion weights, counted in seconds, none in memory."""
    llava_config(LlamaConfig(**VICUNA)).save_pretrained(tmp_path)
    args = VLMModelConfig(
        model_name_or_path=str(tmp_path), dtype="bfloat16", use_peft=True, lora_r=128, lora_alpha=256
    )
    model = meta_model(args, [32000, 32001, 32002])
    assert all(p.is_meta for p in model.parameters())
    counted = facts(model, args, 8, 700, 800)
    total = sum(counted.frozen.values()) + sum(counted.trained.values())
    assert total - sum(counted.trained.values()) == pytest.approx(7.08e9, rel=0.01)
    got = estimate(counted, "zero2", 8)
    # 14.2 GB of frozen weights; 0.34 billion LoRA weights of rank 128 and the projector train
    assert 14e9 < got.weights < 16e9 and sum(counted.trained.values()) == pytest.approx(0.341e9, rel=0.02)
    assert got.total < 40e9
