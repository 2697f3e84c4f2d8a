import families
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.models.parts import (
    count_parameters,
    parameter_groups,
    part_of,
    parts,
    projector_modules,
    set_trainable,
)

FAMILIES = ["llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "idefics3", "smolvlm"]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", "vision"),
        ("model.multi_modal_projector.linear_1.weight", "projector"),
        ("model.language_model.layers.0.self_attn.q_proj.weight", "language"),
        ("lm_head.weight", "language"),
        ("model.visual.blocks.0.attn.qkv.weight", "vision"),
        ("model.visual.merger.mlp.0.weight", "projector"),
        ("model.visual.deepstack_merger_list.2.norm.weight", "projector"),
        ("model.connector.modality_projection.proj.weight", "projector"),
        ("model.text_model.layers.3.mlp.up_proj.weight", "language"),
        ("model.image_newline", "projector"),
        ("base_model.model.model.visual.merger.modules_to_save.default.mlp.0.weight", "projector"),
        ("base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.default.weight", "language"),
    ],
)
def test_part_of(name, part):
    assert part_of(name) == part


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_three_parts(family):
    model, _ = getattr(families, family)()
    parameters = parts(model)
    assert all(parameters.values())
    assert sum(map(len, parameters.values())) == len(list(model.parameters()))
    embedding = model.get_input_embeddings().weight
    assert any(p is embedding for _, p in parameters["language"])
    modules = dict(model.named_modules())
    assert all(part_of(n) == "projector" and n in modules for n in projector_modules(model))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trained", [("vision",), ("projector",), ("language",), ("projector", "language")])
def test_set_trainable_reaches_these_parts_only(family, trained):
    model, _ = getattr(families, family)()
    set_trainable(model, **{part: part in trained for part in ("vision", "projector", "language")})
    for part, count in count_parameters(model).items():
        assert count["trainable"] == (count["total"] if part in trained else 0)


def test_text_models_are_refused():
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UserError, match="no vision tower"):
        parts(LlamaForCausalLM(config))


def test_projector_gets_its_own_learning_rate():
    model, _ = families.llava()
    named = dict(model.named_parameters())
    groups = [
        {
            "params": [p for n, p in named.items() if ("bias" in n) == bias],
            "weight_decay": 0.0 if bias else 0.1,
        }
        for bias in (False, True)
    ]
    optimizer, names = torch.optim.AdamW(groups, lr=1e-3), {id(p): n for n, p in named.items()}
    rates = []
    for group in parameter_groups(optimizer.param_groups, names, 2e-5):
        for parameter in group["params"]:
            name = names[id(parameter)]
            rates.append((name, group["lr"]))
            assert group["weight_decay"] == (0.0 if "bias" in name else 0.1)
            assert group["betas"] == (0.9, 0.999)
    assert sorted(name for name, _ in rates) == sorted(named)
    assert {n for n, lr in rates if lr == 2e-5} == {n for n in named if "multi_modal_projector" in n}
