"""Packed batches against padded ones: loss and every gradient, for every family that can; refusals for the others."""

import copy
import itertools
from functools import cache

import families
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_rows import NOUNS, mixed_rows, row, tagged_rows
from transformers import AttentionInterface
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from vlm_sft_rl.data.collators import VisionCollator
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.models.parts import capture_outputs
from vlm_sft_rl.packing.attention import enable_packing
from vlm_sft_rl.packing.collator import PackedCollator
from vlm_sft_rl.packing.layout import as_table, rows_of
from vlm_sft_rl.packing.trainer import proof_batches, why_not

CAN = ["llava", "llava_next", "llava_mistral", "qwen2_vl", "qwen2_5_vl", "idefics3", "smolvlm"]
CAN += ["qwen3_vl", "internvl", "llava_more"]


@cache
def built(family):
    model, processor = getattr(families, family)()
    packable = copy.deepcopy(model)
    enable_packing(packable, prefixes=True)
    return model, packable, processor


def loss_and_gradients(model, batch, count):
    """Weighted loss divided by `count`, and the gradient of every parameter that has one."""
    model.zero_grad()
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "loss_weights")}
    logp = model(**inputs).logits[:, :-1].float().log_softmax(-1)
    labels, weights = batch["labels"][:, 1:], batch["loss_weights"][:, 1:]
    loss = -(logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * weights).sum() / count
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients


def assert_equal_training(family, rows, packing, **kwargs):
    model, packable, processor = built(family)
    padded = VisionCollator(processor, **kwargs)(rows)
    packed = PackedCollator(processor, packing=packing, **kwargs)(rows)
    assert packed["input_ids"].shape[0] == 1
    assert (packed["labels"] != -100).sum() == (padded["labels"][:, 1:] != -100).sum()
    count = int((padded["labels"] != -100).sum())
    wanted, theirs = loss_and_gradients(model, padded, count)
    loss, ours = loss_and_gradients(packable, packed, count)
    assert abs(loss - wanted) < 1e-5 and ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() < 1e-5, name
    return packed, padded


def halves(example):
    """A mark: weights that differ from token to token."""
    weights = [w * (0.5 + i % 3) for i, w in enumerate(example.weights)]
    return copy.copy(example).__class__(**{**vars(example), "weights": weights})


@pytest.mark.parametrize("packing", ["rows", "image"])
@pytest.mark.parametrize("family", CAN)
def test_loss_and_gradients_equal_the_padded_batch(family, packing):
    rows = mixed_rows()
    packed, padded = assert_equal_training(family, rows, packing, marks=[halves])
    tokens = int(padded["attention_mask"].sum())
    assert (
        packed["input_ids"].shape[1] == tokens if packing == "rows" else packed["input_ids"].shape[1] < tokens
    )


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3", "llava_mistral"])
@given(data=st.data())
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_rows_about_any_images(family, data):
    """Random numbers of images, branches, words and turns."""
    rows = []
    for _ in range(data.draw(st.integers(1, 5))):
        images = data.draw(st.lists(st.integers(0, 2), max_size=2))
        words = st.lists(st.sampled_from(NOUNS), min_size=1, max_size=8).map(" ".join)
        rows.append(row(data.draw(words), data.draw(words), *images, id=str(len(rows))))
        if data.draw(st.booleans()):
            turns = [{"role": role, "content": data.draw(words)} for role in ("user", "assistant")]
            rows[-1]["messages"] += turns
    packing = data.draw(st.sampled_from(["rows", "image"]))
    multiple = data.draw(st.sampled_from([None, 32]))
    assert_equal_training(family, rows, packing, pad_to_multiple_of=multiple)


def test_each_image_is_encoded_once():
    _, _, processor = built("llava")
    rows = tagged_rows(pictures=2, each=4)
    padded, packed = VisionCollator(processor)(rows), PackedCollator(processor, packing="image")(rows)
    assert padded["pixel_values"].shape[0] == 8 and packed["pixel_values"].shape[0] == 2
    assert torch.equal(packed["pixel_values"], padded["pixel_values"][[0, 4]])
    image = processor.image_token_id
    assert (packed["input_ids"] == image).sum() * 4 == (padded["input_ids"] == image).sum()


def test_rows_whose_words_before_the_image_differ_do_not_share_it():
    _, _, processor = built("llava")
    rows = [row("q", "a", 0), row("q", "b", 0)]
    rows[1]["messages"][0]["content"] = "Look: <image>\nq"
    batch = PackedCollator(processor, packing="image")(rows)
    assert batch["pixel_values"].shape[0] == 2
    assert_equal_training("llava", rows, "image")


def test_other_attention_implementations_agree():
    model, _, processor = built("qwen2_5_vl")
    dense = copy.deepcopy(model)
    dense.set_attn_implementation("eager")
    enable_packing(dense, prefixes=True)
    rows = mixed_rows()
    padded, packed = VisionCollator(processor)(rows), PackedCollator(processor, packing="image")(rows)
    wanted, theirs = loss_and_gradients(model, padded, 10)
    loss, ours = loss_and_gradients(dense, packed, 10)
    assert abs(loss - wanted) < 1e-5
    assert all((ours[name] - theirs[name]).abs().max() < 1e-5 for name in theirs)


def varlen_attention(module, query, key, value, attention_mask, position_ids=None, scaling=None, **kwargs):
    """What the flash kernel computes: the rows are read off the positions by transformers' own function."""
    assert attention_mask is None
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    (starts, _), _ = prepare_fa_kwargs_from_position_ids(position_ids)
    rows = [
        F.scaled_dot_product_attention(
            *(x[:, :, a:b] for x in (query, key, value)), is_causal=True, scale=scaling
        )
        for a, b in itertools.pairwise(starts.tolist())
    ]
    return torch.cat(rows, dim=2).transpose(1, 2), None


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "internvl"])
def test_flash_attention_is_given_what_it_needs(family):
    """The kernel needs a GPU; a slow one in its place gets the same inputs from the model."""
    model, _, processor = built(family)
    AttentionInterface.register("flash_in_python", varlen_attention)
    flash = copy.deepcopy(model)
    flash.config.get_text_config()._attn_implementation_internal = "flash_in_python"
    enable_packing(flash)
    rows = mixed_rows()
    padded, packed = VisionCollator(processor)(rows), PackedCollator(processor)(rows)
    wanted, theirs = loss_and_gradients(model, padded, 10)
    loss, ours = loss_and_gradients(flash, packed, 10)
    assert abs(loss - wanted) < 1e-5
    assert all((ours[name] - theirs[name]).abs().max() < 1e-5 for name in theirs)


def hidden(model, batch):
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "loss_weights")}
    with torch.no_grad(), capture_outputs(model.base_model) as outputs:
        model(**inputs)
    return outputs[0].last_hidden_state


@pytest.mark.parametrize("packing", ["rows", "image"])
@pytest.mark.parametrize("family", CAN)
def test_the_proof_before_training_accepts_them(family, packing):
    _, packable, processor = built(family)
    batches = proof_batches(PackedCollator(processor, packing=packing), tagged_rows(1, 2))
    assert why_not(lambda batch: hidden(packable, batch), *batches) is None


def test_the_proof_tells_a_leak_from_other_positions():
    model, packable, processor = built("llava")
    batches = proof_batches(PackedCollator(processor, packing="rows"), tagged_rows(1, 2))

    def without_segments(batch):
        return hidden(model, {k: v for k, v in batch.items() if k != "segments"})

    assert "sees the other rows" in why_not(without_segments, *batches)

    def shifted(batch):
        out = hidden(packable, batch)
        return out if "segments" not in batch else out.roll(1, dims=-1)

    assert "attention or positions" in why_not(shifted, *batches)


def test_bidirectional_prefixes_are_found_out():
    model, processor = families.paligemma()
    enable_packing(model)
    batches = proof_batches(PackedCollator(processor), tagged_rows(1, 2))
    assert "attention or positions" in why_not(lambda batch: hidden(model, batch), *batches)


def test_cross_attention_is_refused_by_its_inputs():
    _, processor = families.mllama()
    with pytest.raises(UserError, match="cross_attention_mask"):
        PackedCollator(processor)(tagged_rows(1, 2))


def test_a_processor_that_writes_more_than_its_tokenizer_sees_the_images_again():
    _, processor = families.paligemma()
    rows = tagged_rows(1, 3)
    padded, packed = VisionCollator(processor)(rows), PackedCollator(processor, packing="image")(rows)
    assert packed["pixel_values"].shape[0] == 1
    table = as_table(packed["segments"])
    for i, (start, end, p, q) in enumerate(rows_of(table)):
        ids = [*packed["input_ids"][0, p:q].tolist(), *packed["input_ids"][0, start:end].tolist()]
        assert ids == padded["input_ids"][i][padded["attention_mask"][i] == 1].tolist()
