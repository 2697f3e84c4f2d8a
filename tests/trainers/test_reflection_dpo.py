import json

import families
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from training import history, moved, preference, tagged, trainer_of, weights
from trl import DPOTrainer

from vlm_sft_rl.data.collators import PreferenceCollator
from vlm_sft_rl.data.rows import PAIR_KINDS, read_pairs
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.trainers.reflection_dpo import ReflectionDPOTrainer

FAMILIES = ["llava", "qwen2_5_vl"]


@pytest.fixture
def pairs(tmp_path):
    rows = []
    for i, (kind, weight) in enumerate((("cot", 1.0), ("refine", 0.5), ("cot", 2.0))):
        Image.new("RGB", (28, 28), (60 * i, 10, 90)).save(tmp_path / f"{i}.png")
        rows.append(preference(i, tmp_path / f"{i}.png", pair_kind=kind, pair_weight=weight))
    return rows


def made(folder, rows, family="llava", peft=False, start=None, **settings) -> ReflectionDPOTrainer:
    path = folder / f"model-{family}"
    if not path.exists():
        families.save(*getattr(families, family)(), path)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if peft else None
    options = {"per_device_train_batch_size": 3, "learning_rate": 1e-2, "beta": 0.5, "disable_dropout": True}
    return trainer_of(
        ReflectionDPOTrainer,
        folder,
        rows,
        start or path,
        gradient_checkpointing=False,
        peft_config=lora,
        **(options | settings),
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


def losses(trainer, rows):
    """(ours, stock TRL's) on the same batch."""
    batch = trainer.data_collator(rows)
    stock = {name: value for name, value in batch.items() if not name.startswith("pair_")}
    trainer.model.eval()
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, dict(batch)), DPOTrainer.compute_loss(
            trainer, trainer.model, stock
        )


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_weights_the_loss_is_trls_to_the_last_bit(tmp_path, pairs, family, peft):
    mine = made(tmp_path, plain(pairs), family, peft)
    shake(mine.model)
    ours, stock = losses(mine, plain(pairs))
    assert torch.equal(ours, stock) and abs(float(ours) - 0.6931) > 1e-3


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize(("loss", "sft"), [("sigmoid", False), ("hinge", False), ("sigmoid", True)])
def test_weights_multiply_each_pairs_loss(tmp_path, pairs, loss, sft, peft):
    kinds = {"loss_type": [loss, "sft"], "loss_weights": [1.0, 0.3]} if sft else {"loss_type": [loss]}
    mine = made(tmp_path, pairs, peft=peft, **kinds)
    shake(mine.model)
    ours, whole = losses(mine, pairs)
    preference_only = made(tmp_path, pairs, peft=peft, loss_type=[loss])
    preference_only.model.load_state_dict(mine.model.state_dict())
    each = [float(losses(preference_only, plain([row]))[1]) for row in pairs]
    extra = sum((row["pair_weight"] - 1) * value for row, value in zip(pairs, each, strict=True)) / len(pairs)
    assert float(ours) == pytest.approx(float(whole) + extra, rel=1e-4)


def test_training_prefers_the_chosen_and_logs_every_kind(tmp_path, pairs):
    mine = made(tmp_path, pairs, max_steps=8)
    reference = weights(mine.ref_model)
    mine.train()
    losses, margins = history(mine, "loss"), history(mine, "rewards/margins_cot")
    assert losses[0] == pytest.approx(0.6931 * 3.5 / 3, abs=1e-3)
    assert losses[-1] < losses[0] and margins[-1] > 0 and history(mine, "rewards/accuracies_refine")
    assert not history(mine, "rewards/margins_select")
    total = (2 * margins[-1] + history(mine, "rewards/margins_refine")[-1]) / 3
    assert history(mine, "rewards/margins")[-1] == pytest.approx(total, rel=1e-3)
    assert not moved(reference, mine.ref_model)


def test_an_adapter_is_refused_as_the_start(tmp_path, pairs):
    mine = made(tmp_path, pairs, peft=True)
    assert mine.ref_model is None
    mine.save_model(str(tmp_path / "adapter"))
    with pytest.raises(UserError, match="Merge it first"):
        made(tmp_path, pairs, start=tmp_path / "adapter")
    with pytest.raises(UserError, match="Merge it first"):
        made(tmp_path, pairs, start=(mine.model, mine.processing_class))


def test_a_reference_with_the_old_vocabulary_is_refused(tmp_path, pairs):
    model, processor = families.llava()
    families.save(model, processor, tmp_path / "model-llava")
    loaded = type(model).from_pretrained(tmp_path / "model-llava")
    loaded.resize_token_embeddings(loaded.get_input_embeddings().weight.shape[0] + 8, mean_resizing=False)
    with pytest.raises(UserError, match="tokens were added and not saved"):
        made(tmp_path, pairs, start=(loaded, processor))


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
        made(tmp_path, pairs, **settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_all_chosen_then_all_rejected(pairs, family):
    processor = getattr(families, family)()[1]
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
    with pytest.raises(UserError, match=f"pairs.jsonl:2.*{complaint}"):
        read_pairs(path)


@pytest.fixture
def rewinds(pairs):
    """Pairs of answers whose phrases carry verification tags; the second one lost for a repeat."""
    chosen = "There is <SPAN> a cup </CN>, <SPAN> a star </CN>."
    lost = [
        "There is <SPAN> a cup </CN>, <SPAN> a moon </UN>",
        "There is <SPAN> a cup </CN>, <SPAN> a cup </CN>",
    ]
    return [
        row
        | {"chosen": side(chosen), "rejected": side(text, supervise="text")}
        | {"pair_kind": kind, "pair_weight": 1.0}
        for row, text, kind in zip(pairs, lost, ("doubt", "repeat"), strict=False)
    ]


def side(text, **more):
    return [{"role": "assistant", "content": text, **more}]


def test_no_preference_falls_on_verdicts_nor_on_an_end_that_is_none(rewinds):
    processor = tagged()[1]
    finished = [row | {"rejected": side(row["rejected"][0]["content"])} for row in rewinds]
    whole = PreferenceCollator(processor)(finished)
    phrases = PreferenceCollator(processor, phrases_only=True)(rewinds)
    for row in range(4):
        left_out = whole["input_ids"][row][
            (whole["completion_mask"] - phrases["completion_mask"])[row].bool()
        ]
        tokens = processor.tokenizer.convert_ids_to_tokens(left_out.tolist())
        end = [] if row < 2 else [processor.tokenizer.eos_token]
        assert tokens == ["</CN>", "</UN>" if row == 2 else "</CN>", *end]
    assert torch.equal(whole["input_ids"], phrases["input_ids"])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unfinished_side_has_no_preference_on_what_ends_its_turn(family):
    processor = getattr(families, family)()[1]
    row = {"id": "a", "images": [Image.new("RGB", (56, 56))], "prompt": "What is it?", "rejected": "A star"}
    whole, cut = (
        PreferenceCollator(processor)([row | {"chosen": side("A cup. Of tea", supervise=extent)}])
        for extent in ("all", "text")
    )
    (ended,) = (whole["completion_mask"] != cut["completion_mask"]).any(1).nonzero().tolist()
    assert ended == [0]
    text = processor.tokenizer.decode(cut["input_ids"][0][cut["completion_mask"][0].bool()])
    assert text.strip() == "A cup. Of tea"


@pytest.mark.parametrize("peft", [False, True])
def test_the_verdict_term_is_the_divergence_at_closing_tags_from_the_reference(tmp_path, rewinds, peft):
    families.save(*tagged(), tmp_path / "model-llava")
    mine = made(tmp_path, rewinds, peft=peft, phrases_only=True, verdict_weight=0.5)
    shake(mine.model)
    batch = mine.data_collator(rewinds)
    mine.model.eval()
    with torch.no_grad():
        loss = mine.compute_loss(mine.model, dict(batch))
        mine.args.verdict_weight = 0.0
        without = mine.compute_loss(mine.model, dict(batch))
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        policy = mine.model(**inputs).logits.log_softmax(-1)
        if peft:
            with mine.model.disable_adapter():
                reference = mine.model(**inputs).logits.log_softmax(-1)
        else:
            reference = mine.ref_model(**inputs).logits.log_softmax(-1)
    closing = torch.tensor(mine.processing_class.tokenizer.convert_tokens_to_ids(["</CN>", "</UN>"]))
    rows, places = torch.isin(batch["input_ids"], closing).nonzero(as_tuple=True)
    assert len(rows) == 8
    p, q = reference[rows, places - 1], policy[rows, places - 1]
    expected = (p.exp() * (p - q)).sum(-1).mean()
    assert float(expected) > 1e-4
    assert float(loss - without) == pytest.approx(0.5 * float(expected), rel=1e-3)


def test_training_on_rewinds_moves_the_policy_and_logs_the_drift(tmp_path, rewinds):
    families.save(*tagged(), tmp_path / "model-llava")
    mine = made(tmp_path, rewinds, max_steps=4, phrases_only=True, verdict_weight=1.0)
    before = weights(mine.model)
    mine.train()
    drift = history(mine, "verdict_drift")
    assert drift[0] == pytest.approx(0, abs=1e-6) and drift[-1] > 0 and moved(before, mine.model)
    assert history(mine, "rewards/margins_doubt")[-1] > 0 and history(mine, "rewards/margins_repeat")


def test_verdicts_need_verification_tokens(tmp_path, pairs):
    with pytest.raises(UserError, match="verification tokens"):
        made(tmp_path, plain(pairs), phrases_only=True)
