import json

import families
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from trl import DPOTrainer

from vlm_sft_rl.data.collators import PreferenceCollator
from vlm_sft_rl.data.rows import PAIR_KINDS, read_pairs
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.trainers.reflection_dpo import ReflectionDPOConfig, ReflectionDPOTrainer

FAMILIES = {"llava": families.llava, "qwen2_5_vl": families.qwen2_5_vl}


@pytest.fixture
def pairs(tmp_path):
    rows = []
    for i, (kind, weight) in enumerate((("cot", 1.0), ("refine", 0.5), ("cot", 2.0))):
        Image.new("RGB", (28, 28), (60 * i, 10, 90)).save(tmp_path / f"{i}.png")
        rows.append(
            {
                "id": f"p{i}",
                "images": [str(tmp_path / f"{i}.png")],
                "prompt": [{"role": "user", "content": "How many things?"}],
                "chosen": [{"role": "assistant", "content": "It is one" + " more" * i}],
                "rejected": [{"role": "assistant", "content": "It is two, or three"}],
                "pair_kind": kind,
                "pair_weight": weight,
            }
        )
    return rows


def trainer(folder, rows, family="llava", peft=False, model=None, **settings):
    path = folder / f"model-{family}"
    if not path.exists():
        families.save(*FAMILIES[family](), path)
    options = {
        "per_device_train_batch_size": 3,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "beta": 0.5,
        "disable_dropout": True,
    }
    args = ReflectionDPOConfig(str(folder / "out"), **{**options, **settings})
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if peft else None
    return ReflectionDPOTrainer(
        model or str(path), None, args, train_dataset=Dataset.from_list(rows), peft_config=lora
    )


def plain(rows):
    return [{**row, "pair_weight": 1.0} for row in rows]


def shake(model):
    """Move the policy away from its reference, or every loss is log 2."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


def losses(mine, rows):
    """(ours, stock TRL's) on the same batch."""
    batch = mine.data_collator([dict(r) for r in rows])
    stock = {k: v for k, v in batch.items() if not k.startswith("pair_")}
    mine.model.eval()
    with torch.no_grad():
        return mine._compute_loss(mine.model, dict(batch), False), DPOTrainer._compute_loss(
            mine, mine.model, stock, False
        )


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_weights_the_loss_is_trls_to_the_last_bit(tmp_path, pairs, family, peft):
    mine = trainer(tmp_path, plain(pairs), family, peft)
    shake(mine.model)
    ours, stock = losses(mine, plain(pairs))
    assert torch.equal(ours, stock) and abs(float(ours) - 0.6931) > 1e-3


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize(("loss", "sft"), [("sigmoid", False), ("hinge", False), ("sigmoid", True)])
def test_weights_multiply_each_pairs_loss(tmp_path, pairs, loss, sft, peft):
    kinds = {"loss_type": [loss, "sft"], "loss_weights": [1.0, 0.3]} if sft else {"loss_type": [loss]}
    mine = trainer(tmp_path, pairs, peft=peft, **kinds)
    shake(mine.model)
    ours, whole = losses(mine, pairs)
    preference_only = trainer(tmp_path, pairs, peft=peft, loss_type=[loss])
    preference_only.model.load_state_dict(mine.model.state_dict())
    each = [float(losses(preference_only, plain([row]))[1]) for row in pairs]
    extra = sum((row["pair_weight"] - 1) * value for row, value in zip(pairs, each, strict=True)) / len(pairs)
    assert float(ours) == pytest.approx(float(whole) + extra, rel=1e-4)


def test_training_prefers_the_chosen_and_logs_every_kind(tmp_path, pairs):
    mine = trainer(tmp_path, pairs, max_steps=8)
    reference = [p.detach().clone() for p in mine.ref_model.parameters()]
    mine.train()
    records = [r for r in mine.state.log_history if "loss" in r]
    assert records[0]["loss"] == pytest.approx(0.6931 * 3.5 / 3, abs=1e-3)
    assert records[-1]["loss"] < records[0]["loss"]
    assert records[-1]["rewards/margins_cot"] > 0 and "rewards/accuracies_refine" in records[-1]
    assert "rewards/margins_select" not in records[-1]
    total = (2 * records[-1]["rewards/margins_cot"] + records[-1]["rewards/margins_refine"]) / 3
    assert records[-1]["rewards/margins"] == pytest.approx(total, rel=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(reference, mine.ref_model.parameters(), strict=True))


def test_an_adapter_is_refused_as_the_start(tmp_path, pairs):
    mine = trainer(tmp_path, pairs, peft=True)
    assert mine.ref_model is None
    mine.save_model(str(tmp_path / "adapter"))
    with pytest.raises(UserError, match="Merge it first"):
        trainer(tmp_path, pairs, model=str(tmp_path / "adapter"))
    with pytest.raises(UserError, match="Merge it first"):
        trainer(tmp_path, pairs, model=mine.model)


def test_a_reference_with_the_old_vocabulary_is_refused(tmp_path, pairs):
    model, processor = families.llava()
    families.save(model, processor, tmp_path / "model-llava")
    loaded = type(model).from_pretrained(tmp_path / "model-llava")
    loaded.resize_token_embeddings(loaded.get_input_embeddings().weight.shape[0] + 8, mean_resizing=False)
    with pytest.raises(UserError, match="tokens were added and not saved"):
        trainer(tmp_path, pairs, model=loaded)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"loss_type": ["ipo"]}, "`pair_weight` is defined for"),
        ({"use_weighting": True}, "plain DPO only"),
    ],
)
def test_bad_settings(tmp_path, pairs, settings, complaint):
    with pytest.raises(UserError, match=complaint):
        trainer(tmp_path, pairs, **settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_all_chosen_then_all_rejected(pairs, family):
    processor = FAMILIES[family]()[1]
    batch = PreferenceCollator(processor)(pairs)
    answers = [
        processor.tokenizer.decode(ids[mask.bool()], skip_special_tokens=True).strip()
        for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    ]
    expected = [row[side][0]["content"] for side in ("chosen", "rejected") for row in pairs]
    assert answers == expected
    assert batch["pair_kind"].tolist() == [PAIR_KINDS.index(row["pair_kind"]) for row in pairs]
    assert batch["pair_weight"].tolist() == [1.0, 0.5, 2.0]
    assert "labels" not in batch and "loss_weights" not in batch


def test_nothing_is_cut(pairs):
    with pytest.raises(UserError, match="the limit is 20"):
        PreferenceCollator(families.llava()[1], max_length=20)(pairs)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"chosen": "same", "rejected": "same"}, "are equal"),
        ({"prompt": None}, "field `prompt`"),
        ({"pair_kind": "odd"}, "pair_kind"),
        ({"pair_weight": -1}, "pair_weight"),
    ],
)
def test_bad_pairs_name_their_row(tmp_path, pairs, change, complaint):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [pairs[0], {**pairs[1], **change}]))
    with pytest.raises(UserError, match=f"pairs.jsonl, row 2.*{complaint}"):
        read_pairs(path)
