"""Encoded pictures instead of pixels: the same logits, in any order, and only where nothing on their way is trained."""

from dataclasses import replace

import families
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers.models.llava.modeling_llava import LlavaModel

from vlm_sft_rl.data import chat as prompting
from vlm_sft_rl.decoding.cache import prefill
from vlm_sft_rl.decoding.generate import encode_batch
from vlm_sft_rl.models.images import encode_images, takes_images, trained_projectors, with_images
from vlm_sft_rl.models.parts import LANGUAGE, PROJECTOR, VISION_NAMES, part_of, set_trainable

FAMILIES = [
    "llava", "llava_mistral", "llava_next", "qwen2_vl", "qwen2_5_vl", "idefics3", "smolvlm", "paligemma", "qwen3_vl",
    "gemma3",
]  # fmt: skip
QUESTIONS = ["What is it?", "Where is the thing at the left?", "Who?"]


def frozen(family: str, *, projector: bool = False):
    model, processor = getattr(families, family)()
    set_trainable(model, vision=False, projector=projector, language=True)
    return model, processor


def batch(model, processor, order):
    pictures = [Image.radial_gradient("L").convert("RGB").resize((40 + 16 * i, 56)) for i in range(3)]
    texts = [prompting.render(processor, QUESTIONS[i], 1) for i in order]
    inputs = encode_batch(model, processor, texts, [[pictures[i]] for i in order])
    return {name: value for name, value in inputs.items() if name != "labels"}


def encoded(family: str, *, projector: bool = False):
    """Model, processor, and three pictures as pixels and as `encode_images` gives them."""
    model, processor = frozen(family, projector=projector)
    inputs = batch(model, processor, [0, 1, 2])
    return model, processor, inputs, encode_images(model, inputs, 3, trained_projectors(model) or ())


CASES = [(family, projector) for family in FAMILIES for projector in (False, True)]
CASES.remove(("llava_next", True))


@pytest.mark.parametrize("family, projector", CASES)
def test_passes_over_encoded_pictures_equal_passes_over_pixels(family, projector):
    model, processor, inputs, images = encoded(family, projector=projector)
    assert bool(trained_projectors(model)) == projector and takes_images(model, inputs, images)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if projector and part_of(name) == PROJECTOR:  # it runs anew over what the tower made
                parameter.add_(0.1 * torch.randn_like(parameter))
    # rows in another order, one of them twice, as the samples of a box stand in an update
    order, calls = [2, 0, 2], []
    again = batch(model, processor, order)
    tower = next(m for name, m in model.named_modules() if name.split(".")[-1] in VISION_NAMES)
    with torch.no_grad():
        expected = model(**again).logits
        hook = tower.register_forward_hook(lambda *_: calls.append(1))
        features = with_images(model, again, [images[i] for i in order])
        logits = model(**features).logits
        hook.remove()
    real = again["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], atol=1e-5, rtol=1e-5)
    assert not calls
    if not projector:
        assert not any(image.pooled.requires_grad for image in images)
        over_pixels, over_images = prefill(model, dict(again)), prefill(model, features)
        torch.testing.assert_close(over_images.logits, over_pixels.logits, atol=1e-5, rtol=1e-5)
        for name in ("offsets", "prompts", "planes"):
            assert getattr(over_images, name) == getattr(over_pixels, name)


@pytest.mark.parametrize("projector", [False, True])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3"])
def test_gradients_are_the_same(family, projector):
    model, _, inputs, images = encoded(family, projector=projector)
    gradients = []
    for features in (inputs, with_images(model, inputs, images)):
        model.zero_grad()
        model(**features, use_cache=False).logits.square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert {part_of(name) for name in gradients[0]} == ({LANGUAGE, PROJECTOR} if projector else {LANGUAGE})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-7, rtol=1e-4)


class Through(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.qformer = inner

    def forward(self, hidden):
        return self.qformer(hidden)


def test_a_trained_module_before_the_projector_leaves_nothing_to_keep():
    """As a Q-former before its projection: what the second one reads changes with the first."""
    model, processor = frozen("llava", projector=True)
    layer = next(m for m in model.model.vision_tower.modules() if hasattr(m, "layer_norm2"))
    layer.layer_norm2 = Through(layer.layer_norm2).requires_grad_(True)
    inputs, projectors = batch(model, processor, [0, 1, 2]), trained_projectors(model)
    assert len(projectors) == 2 and encode_images(model, inputs, 3, projectors) is None


class Doubling(LlavaModel):
    def get_image_features(self, pixel_values, **kwargs):
        output = super().get_image_features(pixel_values, **kwargs)
        output.pooler_output = [2 * features for features in output.pooler_output]
        return output


def test_what_is_more_than_rows_of_a_trained_projector_is_left_to_the_model():
    model, processor = frozen("llava", projector=True)
    model.model.__class__ = Doubling
    inputs = batch(model, processor, [0, 1, 2])
    assert encode_images(model, inputs, 3, trained_projectors(model)) is None


def test_a_family_that_reads_more_than_is_kept_is_left_to_the_pixels():
    model, _, inputs, images = encoded("llava")
    others = [replace(image, pooled=image.pooled * 1.1) for image in images]
    assert takes_images(model, inputs, images) and not takes_images(model, inputs, others)

    def refuse(module, args, kwargs):
        if "pixel_values" not in kwargs:
            raise TypeError("forward() missing 1 required positional argument: 'pixel_values'")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    assert not takes_images(model, inputs, images)


@pytest.mark.parametrize("part, once", [("language", True), ("projector", True), ("vision", False)])
@pytest.mark.parametrize("lora", [False, True])
def test_what_an_update_changes_is_encoded_anew(part, once, lora):
    model, _ = families.llava()
    if lora:
        targets = {
            "language": ".*language_model.*q_proj",
            "projector": ".*multi_modal_projector.linear_1",
            "vision": ".*vision_tower.*q_proj",
        }
        model = get_peft_model(model, LoraConfig(target_modules=targets[part]))
    else:
        set_trainable(model, **{name: name == part for name in ("vision", "projector", "language")})
    projectors = trained_projectors(model)
    assert (projectors is not None) == once
    assert not once or bool(projectors) == (part == "projector")


def test_a_trained_parameter_that_is_no_module_is_left_to_the_model():
    model, _ = frozen("llava_next", projector=True)
    assert trained_projectors(model) is None  # `image_newline` joins the projector's rows


def test_a_projector_of_an_unknown_name_is_seen():
    model, _ = frozen("llava")
    model.model.bridge = model.model.multi_modal_projector.requires_grad_(True)
    del model.model.multi_modal_projector
    assert all(part_of(n) == LANGUAGE for n, p in model.named_parameters() if p.requires_grad)
    assert trained_projectors(model) is None


@pytest.mark.parametrize("dropout", [torch.nn.Dropout(0.1), 0.1], ids=["module", "number"])
def test_a_tower_with_dropout_is_encoded_anew(dropout):
    model, _ = frozen("llava")
    attention = next(m for m in model.model.vision_tower.modules() if hasattr(m, "q_proj"))
    attention.dropout = dropout
    assert trained_projectors(model) is None


@pytest.mark.parametrize("family", ["idefics3", "internvl"])
def test_tiles_that_cannot_be_told_apart_are_left_to_the_model(family):
    model, processor = frozen(family)
    inputs = batch(model, processor, [0, 1])
    pixels = inputs["pixel_values"]
    # as if each picture had two tiles
    inputs["pixel_values"] = torch.cat([pixels, pixels], 1 if pixels.ndim == 5 else 0)
    assert encode_images(model, inputs, 2) is None
