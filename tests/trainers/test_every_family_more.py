"""DPO and SC-Tune on every family: one pass of a recipe through the real classes, or the refusal before a weight moves.

`test_reflection_dpo` and `test_sc_tune` hold the algorithms; here is what a family could break.
"""

import math
import warnings

import families
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from regions import region_rows
from safetensors.torch import load_file
from training import OTHERS, QUICK, history, recipe_of

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.models.load import VLMModelConfig, load_for_training
from vlm_sft_rl.models.lora import build_peft_config
from vlm_sft_rl.models.parts import LANGUAGE, VISION, part_of
from vlm_sft_rl.train import parse, run

QLORA = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True}
FAMILIES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
OWN_BOXES = (
    "llava",
    "llava_mistral",
    "llava_more",
    "llava_next",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
)


def recipe(folder, family: str, method: str, rows: list[dict], **settings) -> dict:
    families.save(*getattr(families, family)(), folder / "model")
    lora = {"use_peft": True, "lora_r": 4, "train_projector": False, "learning_rate": 1e-2, "bf16": False}
    return recipe_of(folder, method, rows, **(lora | settings))


def pairs(folder) -> list[dict]:
    rows = []
    for i in range(4):
        Image.linear_gradient("L").rotate(20 * i).convert("RGB").resize((56, 56)).save(folder / f"{i}.png")
        rows.append(
            {
                "id": f"p{i}",
                "images": [f"{i}.png"],
                "prompt": [{"role": "user", "content": "How many things?"}],
                "chosen": [{"role": "assistant", "content": "It is one" + " more" * i}],
                "rejected": [{"role": "assistant", "content": "It is two, or three"}],
            }
        )
    return rows


def regions(folder) -> list[dict]:
    rows = region_rows(6)
    for row in rows:
        row["image"].save(folder / f"{row['id']}.png")
    return [row | {"image": f"{row['id']}.png"} for row in rows]


def region_recipe(folder, family: str, **settings) -> dict:
    loop = {"describer_steps": 2, "locator_steps": 1, "min_new_tokens": 1, "top_p": 0.9}
    loop |= {"describe_max_new_tokens": 6, "locate_max_new_tokens": 8}
    if family not in OWN_BOXES:
        loop["box_convention"] = "llava"
    return recipe(folder, family, "sc_tune", regions(folder), **(loop | settings))


def run_it(settings: dict, **options):
    return run(settings, *parse(settings, [], "recipe"), **options)


def trained(settings: dict):
    """The finished trainer of a recipe; every figure it logged is finite, and LoRA on the language model alone moved."""
    made = run_it(settings)
    figures = [value for entry in made.state.log_history for value in entry.values()]
    assert all(math.isfinite(value) for value in figures if isinstance(value, float))
    adapter = load_file(f"{settings['output_dir']}/adapter_model.safetensors")
    changed = {name for name, tensor in adapter.items() if "lora_B" in name and tensor.abs().sum() > 0}
    assert changed and {part_of(name) for name in changed} == {LANGUAGE}
    assert not [name for name in adapter if part_of(name) == VISION]
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_dpo(tmp_path, family):
    made = trained(recipe(tmp_path, family, "reflection_dpo", pairs(tmp_path), beta=0.5, max_steps=6))
    losses = history(made, "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and losses[-1] < losses[0]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mllama"])
def test_sc_tune(tmp_path, family):
    made = trained(region_recipe(tmp_path, family))
    phases = [{key.split("/")[0] for key in entry if "/" in key} for entry in made.state.log_history[:3]]
    assert phases == [{"describer"}, {"describer"}, {"locator"}]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mllama"])
def test_sc_tune_with_qlora(tmp_path, family):
    settings = region_recipe(tmp_path, family, **QLORA)
    with warnings.catch_warnings():
        # a kernel without a gradient, taken after the first decoding, only warns
        warnings.filterwarnings("error", message=".*autograd kernel was not registered")
        made = trained(settings)
    packed = {name for name, p in made.model.named_parameters() if p.dtype == torch.uint8}
    assert {part_of(name) for name in packed} == {LANGUAGE}
    # the frozen copy is a second adapter, not a second set of quantised weights
    assert all("lora" in name for name in made.frozen.names)


def test_gradients_of_quantised_weights_are_the_same_after_decoding(tmp_path):
    folder = families.save(*families.llava(hidden=128), tmp_path / "model")
    args = VLMModelConfig(model_name_or_path=str(folder), dtype="float32", use_peft=True, **QLORA)
    model, _, _, _ = load_for_training(args, verification=False)
    model = get_peft_model(model, build_peft_config(model, args, ()))
    ids = torch.arange(20, 60).view(2, 20)

    def gradients():
        model.train().zero_grad()
        embedded = model.get_input_embeddings()(ids).requires_grad_()
        return torch.autograd.grad(model(inputs_embeds=embedded).logits.square().sum(), embedded)[0]

    before = gradients()
    with torch.no_grad():
        model.eval()(input_ids=ids)
    assert before.abs().sum() > 0 and torch.equal(gradients(), before)


@pytest.mark.parametrize("dry_run", [False, True])
def test_sc_tune_is_refused_where_keys_cannot_be_rewound(tmp_path, dry_run):
    settings = region_recipe(tmp_path, "mllama")
    (tmp_path / "model/model.safetensors").unlink()  # the config says it all
    with pytest.raises(UserError, match=r"'mllama' cannot share one prefill.*cross-attention"):
        run_it(settings, dry_run=dry_run)


@pytest.mark.parametrize("make", [region_recipe, lambda f, name: recipe(f, name, "reflection_dpo", pairs(f))])
def test_a_bidirectional_prompt_is_refused(tmp_path, make):
    with pytest.raises(UserError, match="an answer could see itself"):
        run_it(make(tmp_path, "paligemma"))
