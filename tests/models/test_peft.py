import re

import families
import pytest
import torch
from peft import get_peft_model
from trl.trainer.utils import add_fused_lm_head

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.models.load import VLMModelConfig
from vlm_sft_rl.models.lora import build_peft_config, finish_peft, language_targets, trainable_rows
from vlm_sft_rl.models.tokens import add_verification_tokens, is_tied

CASES = [(family, tie) for family in ("llava", "qwen2_5_vl") for tie in (False, True)]


def wrapped(family, tie, **settings):
    model, processor = getattr(families, family)(tie=tie)
    ids = add_verification_tokens(model, processor)
    config = build_peft_config(model, VLMModelConfig(use_peft=True, lora_r=4, **settings), ids)
    add_fused_lm_head(model)
    torch.manual_seed(0)
    return finish_peft(get_peft_model(model, config)), ids


@pytest.mark.parametrize(("family", "tie"), CASES)
def test_the_right_parameters_train(family, tie):
    model, ids = wrapped(family, tie)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    lora = [n for n in trained if "lora_" in n]
    rows = [n for n in trained if "trainable_tokens_delta" in n]
    projector = [n for n in trained if n not in (*lora, *rows)]
    assert len(lora) == 2 * 7 * 2 and all("language_model.layers" in n and "lm_head" not in n for n in lora)
    assert projector and all(
        "modules_to_save" in n and ("projector" in n or "merger" in n) for n in projector
    )
    assert len(rows) == (1 if tie else 2)
    assert is_tied(model.get_base_model()) in (tie, False)  # the wrappers hide it; their adapters are shared
    assert list(trainable_rows(model).values()) == [ids, ids]


@pytest.mark.parametrize(("family", "tie"), CASES)
def test_fused_and_native_heads_agree_in_loss_and_gradient(family, tie):
    losses, gradients = [], []
    for fused in (False, True):
        model, ids = wrapped(family, tie)
        torch.manual_seed(1)
        labels = torch.randint(0, 256, (2, 12))
        labels[:, 3], labels[:, 7] = ids[0], ids[1]
        mask = torch.ones_like(labels)
        loss = model(input_ids=labels, attention_mask=mask, labels=labels, fused_lm_head=fused).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({n: p.grad for n, p in model.named_parameters() if "tokens_delta" in n})
    assert torch.allclose(*losses, atol=1e-6)
    for name, gradient in gradients[0].items():
        assert gradient.norm() > 0 and torch.allclose(gradient, gradients[1][name], atol=1e-6), name


@pytest.mark.parametrize(("family", "tie"), CASES)
def test_a_step_moves_the_new_rows_and_no_other(family, tie):
    model, ids = wrapped(family, tie)
    base = model.get_base_model()

    def matrices():
        modules = (base.get_input_embeddings(), base.get_output_embeddings())
        return [module.weight.detach().clone() for module in modules]

    before = matrices()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    x = torch.tensor([[5, ids[0], 7, ids[1], 9, ids[2], 11]])
    model(input_ids=x, labels=x, fused_lm_head=True).loss.backward()
    optimizer.step()
    for old, new in zip(before, matrices(), strict=True):
        moved = (old != new).any(dim=1).nonzero().flatten().tolist()
        assert moved == ids


def test_targets_can_be_narrowed_to_known_names():
    model, _ = families.llava()
    pattern = language_targets(model, ["q_proj", "v_proj"])
    hits = [n for n, _ in model.named_modules() if re.fullmatch(pattern, n)]
    assert len(hits) == 4 and all("language_model" in n for n in hits)
    assert language_targets(model, r".*vision_tower.*\.fc1") == r".*vision_tower.*\.fc1"
    assert language_targets(model, "all-linear") == language_targets(model)
    with pytest.raises(UserError, match=r"wq.*down_proj"):
        language_targets(model, ["wq"])
    with pytest.raises(UserError, match="matches no module of Llava"):
        language_targets(model, "language.*q_proj")
    with pytest.raises(UserError, match="is no regular expression"):
        language_targets(model, "(q_proj")


def test_what_lora_cannot_do_is_refused():
    model, _ = families.llava()
    assert build_peft_config(model, VLMModelConfig(), [1]) is None
    with pytest.raises(UserError, match="freeze_vision"):
        build_peft_config(model, VLMModelConfig(use_peft=True, freeze_vision=False), [1])
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.lm_head.out_features))
    with pytest.raises(UserError, match="bias"):
        build_peft_config(model, VLMModelConfig(use_peft=True), [1, 2, 3])


def test_low_precision_projectors_are_raised_to_float32():
    model, processor = families.llava()
    ids = add_verification_tokens(model, processor)
    model = model.to(torch.bfloat16)
    peft = get_peft_model(model, build_peft_config(model, VLMModelConfig(use_peft=True), ids))
    trained = [p for p in peft.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32, torch.bfloat16}
    finish_peft(peft)
    assert {p.dtype for p in trained} == {torch.float32}
    assert model.model.vision_tower.dtype == torch.bfloat16
