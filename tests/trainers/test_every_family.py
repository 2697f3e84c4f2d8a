"""Prepare, train, save, merge, reload, decode with rewinds: one pass through every family's real classes."""

import math
from functools import cache

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tagged_rows import prepared
from training import OTHERS, QUICK, history, loaded_trainer, moved, trainable, weights

from vlm_sft_rl.decoding import capabilities
from vlm_sft_rl.decoding import generate as hf
from vlm_sft_rl.decoding.cache import RecomputeBackend
from vlm_sft_rl.decoding.config import RetrospectiveConfig
from vlm_sft_rl.models.checkpoints import merge
from vlm_sft_rl.models.load import load_for_inference, load_model
from vlm_sft_rl.models.lora import trainable_rows
from vlm_sft_rl.models.parts import LANGUAGE, PROJECTOR, VISION, part_of
from vlm_sft_rl.models.report import startup_report
from vlm_sft_rl.models.tokens import verification_token_ids

FAMILIES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
# with its usual window of 12 tokens nothing of the image would reach the answer
OPTIONS = {"llava_mistral": {"window": 128}}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Prepared tiny checkpoints, each written once."""

    @cache
    def get(family: str):
        return prepared(tmp_path_factory.mktemp(family), family, **OPTIONS.get(family, {}))

    return get


def decoded(path, monkeypatch, *, recompute: bool):
    model, processor, _ = load_for_inference(path, device="cpu")
    with torch.no_grad():  # a random model hardly ever says a tag
        model.get_output_embeddings().weight[verification_token_ids(processor)] *= 60
    if recompute:
        monkeypatch.setattr(capabilities, "choose_backend", lambda model, copies: RecomputeBackend(model))
    pictures = [Image.linear_gradient("L").rotate(angle).convert("RGB").resize((56, 42)) for angle in (0, 90)]
    config = RetrospectiveConfig(
        threshold=0.003, temperature=1.0, max_new_tokens=60, local_attempts=3, total_attempts=8
    )
    answers = hf.generate_retrospective(model, processor, pictures, ["What is there?"] * 2, config)
    monkeypatch.undo()
    return answers


def assert_same_decisions(fast, slow):
    """Equal texts and equal traces, with a rewind among them; P(</UN>) to 1e-4."""
    assert [answer.tagged_text for answer in fast] == [answer.tagged_text for answer in slow]
    events = [[dict(e) for answer in answers for e in answer.trace] for answers in (fast, slow)]
    assert any(event["kind"] == "local_rewind" for event in events[0])
    for ours, theirs in zip(*events, strict=True):
        p, q = (event.pop("p_unconfident", None) for event in (ours, theirs))
        assert ours == theirs and p == pytest.approx(q, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora(tmp_path, checkpoint, family, monkeypatch):
    trainer, ids = loaded_trainer(checkpoint(family), tmp_path, use_peft=True, lora_r=4)
    report = startup_report(
        trainer.model, trainer.processing_class, trainer.train_dataset, trainer.data_collator, rows=2
    )
    assert report["image_tokens"] > 0 and set(map(tuple, report["token_rows"].values())) == {tuple(ids)}
    assert all(report["parameters"][part]["trainable"] > 0 for part in (PROJECTOR, LANGUAGE))
    assert report["parameters"][VISION]["trainable"] == 0
    trainer.train()
    trainer.save_model()
    figures = merge(trainer.args.output_dir, tmp_path / "merged")
    assert figures.effect > 1e-3 and figures.error < 1e-5
    adapted = decoded(trainer.args.output_dir, monkeypatch, recompute=False)
    merged = decoded(tmp_path / "merged", monkeypatch, recompute=False)
    assert [answer.tagged_text for answer in adapted] == [answer.tagged_text for answer in merged]
    slow = decoded(tmp_path / "merged", monkeypatch, recompute=True)
    assert_same_decisions(merged, slow)


@pytest.mark.parametrize("family", FAMILIES)
def test_qlora(tmp_path, checkpoint, family):
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True}
    trainer, ids = loaded_trainer(checkpoint(family), tmp_path, use_peft=True, lora_r=4, **settings)
    packed = {name for name, p in trainer.model.named_parameters() if p.dtype == torch.uint8}
    assert {part_of(name) for name in packed} == {LANGUAGE}
    assert not [name for name in packed if "lm_head" in name]
    assert set(map(tuple, trainable_rows(trainer.model).values())) == {tuple(ids)}
    trainer.train()
    trainer.save_model()
    figures = merge(trainer.args.output_dir, tmp_path / "merged")
    assert figures.effect > 1e-3 and figures.error < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_full_training(tmp_path, checkpoint, family, monkeypatch):
    trainer, _ = loaded_trainer(checkpoint(family), tmp_path)
    before = weights(trainer.model)
    trainer.train()
    changed = moved(before, trainer.model)
    assert {part_of(name) for name in changed} == {PROJECTOR, LANGUAGE}
    unmoved = {name for name in before.keys() - changed if part_of(name) != VISION}
    assert not [name for name in unmoved if before[name].abs().sum() > 0 and "norm" not in name], unmoved
    head = trainer.model.get_output_embeddings().weight
    trainer.save_model()
    again = load_model(trainer.args.output_dir)
    assert torch.equal(again.get_output_embeddings().weight, head)
    assert load_file(tmp_path / "out" / "model.safetensors")
    # the answers with cached keys rewound are those of computing everything again after each rewind
    fast = decoded(trainer.args.output_dir, monkeypatch, recompute=False)
    slow = decoded(trainer.args.output_dir, monkeypatch, recompute=True)
    assert_same_decisions(fast, slow)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_on_16_bit_weights_without_autocast(tmp_path, checkpoint, family):
    """A recipe for a GPU (`dtype: bfloat16`) tried on a CPU: the projector must not be of another dtype than its input."""
    trainer, _ = loaded_trainer(checkpoint(family), tmp_path, use_peft=True, lora_r=4, dtype="bfloat16")
    assert not trainer.args.bf16
    before = weights(trainer.model)
    trainer.train()
    changed = moved(before, trainer.model) & trainable(trainer.model)
    assert {part_of(name) for name in changed} == {PROJECTOR, LANGUAGE}
    assert math.isfinite(history(trainer, "train_loss")[-1])
