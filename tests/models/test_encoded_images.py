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
    "llava",
    "llava_mistral",
    "llava_next",
    "qwen2_vl",
    "qwen2_5_vl",
    "idefics3",
    "smolvlm",
    "paligemma",
    "qwen3_vl",
    "gemma3",
]
QUESTIONS = ["What is it?", "Where is the thing at the left?", "Who?"]


def made(family: str):
    return getattr(families, family)()


def frozen(family: str, *, projector: bool = False):
    model, processor = made(family)
    set_trainable(model, vision=False, projector=projector, language=True)
    return model, processor


def batch(model, processor, order):
    pictures = [Image.radial_gradient("L").convert("RGB").resize((40 + 16 * i, 56)) for i in range(3)]
    texts = [prompting.render(processor, QUESTIONS[i], 1) for i in order]
    inputs = encode_batch(model, processor, texts, [[pictures[i]] for i in order])
    return {name: value for name, value in inputs.items() if name != "labels"}


@pytest.mark.parametrize("family", FAMILIES)
def test_passes_over_encoded_pictures_equal_passes_over_pixels(family):
    model, processor = frozen(family)
    inputs = batch(model, processor, [0, 1, 2])
    images = encode_images(model, inputs, 3)
    assert trained_projectors(model) == [] and takes_images(model, inputs, images)
    assert not any(image.pooled.requires_grad for image in images)
    # rows in another order, one of them twice, as the samples of a box stand in an update
    order = [2, 0, 2]
    again = batch(model, processor, order)
    given = with_images(model, again, [images[i] for i in order])
    with torch.no_grad():
        wanted, found = model(**again).logits, model(**given).logits
    real = again["attention_mask"].bool()
    torch.testing.assert_close(found[real], wanted[real], atol=1e-5, rtol=1e-5)
    one, other = prefill(model, dict(again)), prefill(model, given)
    torch.testing.assert_close(other.logits, one.logits, atol=1e-5, rtol=1e-5)
    assert (other.offsets, other.prompts, other.planes) == (one.offsets, one.prompts, one.planes)


@pytest.mark.parametrize("projector", [False, True])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3"])
def test_gradients_are_the_same(family, projector):
    model, processor = frozen(family, projector=projector)
    inputs = batch(model, processor, [0, 1, 2])
    images = encode_images(model, inputs, 3, trained_projectors(model))
    gradients = []
    for own in (inputs, with_images(model, inputs, images)):
        model.zero_grad()
        model(**own, use_cache=False).logits.square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert {part_of(name) for name in gradients[0]} == ({LANGUAGE, PROJECTOR} if projector else {LANGUAGE})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("family", [one for one in FAMILIES if one != "llava_next"])
def test_a_trained_projector_runs_anew_over_what_the_tower_made(family):
    model, processor = frozen(family, projector=True)
    inputs = batch(model, processor, [0, 1, 2])
    images = encode_images(model, inputs, 3, trained_projectors(model))
    assert takes_images(model, inputs, images)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part_of(name) == PROJECTOR:
                parameter.add_(0.1 * torch.randn_like(parameter))
    order = [2, 0, 2]
    again = batch(model, processor, order)
    calls = []
    tower = next(m for name, m in model.named_modules() if name.split(".")[-1] in VISION_NAMES)
    with torch.no_grad():
        wanted = model(**again).logits
        hook = tower.register_forward_hook(lambda *own: calls.append(1))
        found = model(**with_images(model, again, [images[i] for i in order])).logits
        hook.remove()
    real = again["attention_mask"].bool()
    torch.testing.assert_close(found[real], wanted[real], atol=1e-5, rtol=1e-5)
    assert not calls


def test_a_trained_parameter_that_is_no_module_is_left_to_the_model():
    model, _ = frozen("llava_next", projector=True)
    assert trained_projectors(model) is None  # `image_newline` joins the projector's rows


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


def test_a_family_that_wants_the_pixels_all_the_same_is_left_to_them():
    model, processor = frozen("llava")
    inputs = batch(model, processor, [0, 1, 2])
    images = encode_images(model, inputs, 3)

    def refuse(module, args, kwargs):
        if "pixel_values" not in kwargs:
            raise TypeError("forward() missing 1 required positional argument: 'pixel_values'")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    assert not takes_images(model, inputs, images)


class Doubling(LlavaModel):
    def get_image_features(self, pixel_values, **kwargs):
        output = super().get_image_features(pixel_values, **kwargs)
        output.pooler_output = [2 * one for one in output.pooler_output]
        return output


def test_what_is_more_than_rows_of_a_trained_projector_is_left_to_the_model():
    model, processor = frozen("llava", projector=True)
    model.model.__class__ = Doubling
    inputs = batch(model, processor, [0, 1, 2])
    assert encode_images(model, inputs, 3, trained_projectors(model)) is None


@pytest.mark.parametrize(
    "where, once",
    [
        ("language", True),
        ("projector", True),
        ("vision", False),
        ("lora_language", True),
        ("lora_projector", True),
        ("lora_vision", False),
    ],
)
def test_what_an_update_changes_is_encoded_anew(where, once):
    model, _ = families.llava()
    if where.startswith("lora"):
        targets = {
            "lora_language": ".*language_model.*q_proj",
            "lora_projector": ".*multi_modal_projector.linear_1",
            "lora_vision": ".*vision_tower.*q_proj",
        }
        model = get_peft_model(model, LoraConfig(target_modules=targets[where]))
    else:
        set_trainable(model, **{part: part == where for part in ("vision", "projector", "language")})
    found = trained_projectors(model)
    assert (found is not None) == once
    if once:
        assert bool(found) == ("projector" in where)


def test_a_projector_of_an_unknown_name_is_seen():
    model, _ = frozen("llava")
    model.model.bridge = model.model.multi_modal_projector.requires_grad_(True)
    del model.model.multi_modal_projector
    assert all(part_of(n) == LANGUAGE for n, p in model.named_parameters() if p.requires_grad)
    assert trained_projectors(model) is None


@pytest.mark.parametrize("kind", ["module", "number"])
def test_a_tower_with_dropout_is_encoded_anew(kind):
    model, _ = frozen("llava")
    attention = next(m for m in model.model.vision_tower.modules() if hasattr(m, "q_proj"))
    attention.dropout = torch.nn.Dropout(0.1) if kind == "module" else 0.1
    assert trained_projectors(model) is None


@pytest.mark.parametrize("family", ["idefics3", "internvl"])
def test_tiles_that_cannot_be_told_apart_are_left_to_the_model(family):
    model, processor = frozen(family)
    inputs = batch(model, processor, [0, 1])
    pixels = inputs["pixel_values"]
    # as if each picture had two tiles
    inputs["pixel_values"] = torch.cat([pixels, pixels], 1 if pixels.ndim == 5 else 0)
    assert encode_images(model, inputs, 2) is None


def test_a_family_that_reads_more_than_is_kept_is_noticed():
    model, processor = frozen("llava")
    inputs = batch(model, processor, [0, 1, 2])
    images = encode_images(model, inputs, 3)
    others = [replace(image, pooled=image.pooled * 1.1) for image in images]
    assert takes_images(model, inputs, images) and not takes_images(model, inputs, others)
