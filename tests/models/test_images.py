"""Encoded pictures instead of pixels: the same logits, in any order, and only where nothing on their way is trained."""

import families
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from vlm_sft_rl.decoding import prompt as prompting
from vlm_sft_rl.decoding.hf import encode_batch
from vlm_sft_rl.decoding.prefill import prefill
from vlm_sft_rl.models.freeze import set_trainable
from vlm_sft_rl.models.images import encode_images, encodes_once, with_images

FAMILIES = [
    "llava",
    "llava_mistral",
    "llava_next",
    "qwen2_vl",
    "qwen2_5_vl",
    "idefics3",
    "smolvlm",
    "paligemma",
]
QUESTIONS = ["What is it?", "Where is the thing at the left?", "Who?"]


def frozen(family: str):
    model, processor = getattr(families, family)()
    set_trainable(model, vision=False, projector=False, language=True)
    return model, processor


def batch(model, processor, order):
    pictures = [Image.radial_gradient("L").convert("RGB").resize((40 + 16 * i, 56)) for i in range(3)]
    texts = [prompting.render(processor, QUESTIONS[i], 1) for i in order]
    return encode_batch(model, processor, texts, [[pictures[i]] for i in order])


@pytest.mark.parametrize("family", FAMILIES)
def test_passes_over_encoded_pictures_equal_passes_over_pixels(family):
    model, processor = frozen(family)
    inputs = batch(model, processor, [0, 1, 2])
    images = encode_images(model, inputs, 3)
    assert encodes_once(model) and not any(image.pooled.requires_grad for image in images)
    # rows in another order, one of them twice, as the samples of a box stand in an update
    order = [2, 0, 2]
    again = batch(model, processor, order)
    given = with_images(again, [images[i] for i in order])
    with torch.no_grad():
        wanted, found = model(**again).logits, model(**given).logits
    real = again["attention_mask"].bool()
    torch.testing.assert_close(found[real], wanted[real], atol=1e-5, rtol=1e-5)
    one, other = prefill(model, dict(again)), prefill(model, given)
    torch.testing.assert_close(other.logits, one.logits, atol=1e-5, rtol=1e-5)
    assert (other.offsets, other.prompts, other.planes) == (one.offsets, one.prompts, one.planes)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_gradients_of_the_language_model_are_the_same(family):
    model, processor = frozen(family)
    inputs = batch(model, processor, [0, 1, 2])
    gradients = []
    for own in (inputs, with_images(inputs, encode_images(model, inputs, 3))):
        model.zero_grad()
        model(**own, use_cache=False).logits.square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize(
    "where, once",
    [
        ("language", True),
        ("projector", False),
        ("vision", False),
        ("lora_language", True),
        ("lora_vision", False),
    ],
)
def test_what_an_update_changes_is_encoded_anew(where, once):
    model, _ = families.llava()
    if where.startswith("lora"):
        part = "language_model" if where == "lora_language" else "vision_tower"
        model = get_peft_model(model, LoraConfig(target_modules=rf".*{part}.*q_proj"))
    else:
        set_trainable(model, **{part: part == where for part in ("vision", "projector", "language")})
    assert encodes_once(model) == once


def test_a_tower_with_dropout_is_encoded_anew():
    model, _ = frozen("llava")
    model.model.vision_tower.append_dropout = torch.nn.Dropout(0.1)
    assert not encodes_once(model)
