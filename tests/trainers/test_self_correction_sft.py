import copy

import families
import pytest
import torch
from datasets import Dataset
from PIL import Image
from trl import SFTConfig, SFTTrainer

from vlm_sft_rl.data.corrections import Draft, correction_row
from vlm_sft_rl.data.stages import STAGES, Staged, format_staged
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.trainers.mixture_sft import MixtureSFTConfig
from vlm_sft_rl.trainers.self_correction_sft import (
    STAGE_NAMES,
    SelfCorrectionSFTConfig,
    SelfCorrectionSFTTrainer,
    build_correction_collator,
)

FAMILIES = ["llava", "qwen2_5_vl"]


def staged(number):
    return format_staged(Staged("count", f"{number} cats", f"so {number}", str(number)))


def dataset(folder):
    rows = []
    for i in range(6):
        Image.new("RGB", (56, 56), (40 * i, 90, 200)).save(folder / f"{i}.png")
        drafts = [Draft(staged(i + i % 2), i % 2 == 0), Draft(staged(i), True)]
        rows.append(correction_row(f"r{i}", [f"{i}.png"], "How many cats?", drafts, "check"))
    return Dataset.from_list(rows)


def config(folder, **changes):
    settings = {
        "output_dir": str(folder / "out"),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return SelfCorrectionSFTConfig(**{**settings, **changes})


def trained(tmp_path, family="llava", **changes):
    model, processor = getattr(families, family)()
    args = config(tmp_path, **changes)
    trainer = SelfCorrectionSFTTrainer(
        copy.deepcopy(model),
        args,
        data_collator=build_correction_collator(processor, args, image_root=tmp_path),
        train_dataset=dataset(tmp_path),
        processing_class=processor,
    )
    trainer.train()
    return trainer


def history(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_one_are_stock_trl_to_the_last_bit(tmp_path, family):
    mine = trained(tmp_path, family, attempt_loss="all")
    model, processor = getattr(families, family)()
    ours = build_correction_collator(processor, config(tmp_path, attempt_loss="all"), image_root=tmp_path)

    def stripped(rows):
        return {k: v for k, v in ours(rows).items() if k not in ("loss_weights", "stage_ids", "draft_ids")}

    stock = config(tmp_path).to_dict()
    names = (
        "output_dir",
        "max_steps",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "logging_steps",
    )
    names += ("learning_rate", "use_cpu", "save_strategy", "disable_tqdm")
    kept = {k: stock[k] for k in names}
    args = SFTConfig(
        **kept,
        bf16=False,
        max_length=None,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    theirs = SFTTrainer(
        model, args, data_collator=stripped, train_dataset=dataset(tmp_path), processing_class=processor
    )
    theirs.train()
    for key in ("loss", "grad_norm", "num_tokens"):
        assert history(mine, key) == history(theirs, key) and len(history(mine, key)) == 3
    for (name, a), b in zip(theirs.model.state_dict().items(), mine.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_the_loss_and_its_parts_equal_a_slow_reference(tmp_path):
    model, processor = families.llava()
    args = config(
        tmp_path, attempt_weight=0.5, stage_weights={"reasoning": 3.0, "other": 0.25}, attempt_loss="all"
    )
    collator = build_correction_collator(processor, args, image_root=tmp_path)
    rows = dataset(tmp_path)
    trainer = SelfCorrectionSFTTrainer(
        model, args, data_collator=collator, train_dataset=rows, processing_class=processor
    )
    batch = collator([rows[i] for i in range(4)])
    extra = ("labels", "loss_weights", "stage_ids", "draft_ids")
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k not in extra}).logits
    logp = logits[:, :-1].log_softmax(-1)
    total, count, parts = 0.0, 0, {}
    for i in range(4):
        last = batch["draft_ids"][i].max().item()
        for j in range(logp.shape[1]):
            label = batch["labels"][i, j + 1].item()
            if label == -100:
                continue
            stage, draft = batch["stage_ids"][i, j + 1].item(), batch["draft_ids"][i, j + 1].item()
            weight = (0.5 if draft < last else 1.0) * {0: 0.25, 3: 3.0}.get(stage, 1.0)
            loss = -logp[i, j, label].item()
            total, count = total + weight * loss, count + 1
            for name in (STAGE_NAMES[stage], "correction" if draft == last else "attempt"):
                parts.setdefault(name, []).append(loss)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    assert loss.item() == pytest.approx(total / count, rel=1e-5)
    logged = {
        k.removeprefix("loss/"): v[0] for k, v in trainer._metrics["train"].items() if k.startswith("loss/")
    }
    assert logged == {
        name: pytest.approx(sum(values) / len(values), rel=1e-5) for name, values in parts.items()
    }
    assert set(logged) == {*STAGE_NAMES, "attempt", "correction"}


def test_attempts_have_loss_only_where_it_is_asked_for(tmp_path):
    trainer = trained(tmp_path, attempt_loss="none")
    assert history(trainer, "loss/correction") and not history(trainer, "loss/attempt")
    mixed = trained(tmp_path, attempt_loss="right")
    assert history(mixed, "loss/attempt") and history(mixed, "loss/correction")


def test_every_layout_trains(tmp_path):
    lengths = {}
    for layout, after in (("turn", "CONCLUSION"), ("message", "CONCLUSION"), ("stage", "CAPTION")):
        trainer = trained(tmp_path, layout=layout, correction_after=after, max_steps=1)
        assert history(trainer, "loss") == [pytest.approx(history(trainer, "loss")[0])]
        lengths[layout] = history(trainer, "num_tokens")[0]
    assert lengths["stage"] < lengths["message"]


def test_the_published_schedule_decays_by_epoch(tmp_path):
    changes = {"max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 1}
    trainer = trained(tmp_path, epoch_decay=0.85, lr_scheduler_type="cosine", **changes)
    rates = history(trainer, "learning_rate")
    assert rates == pytest.approx([1e-3] * 3 + [0.85e-3] * 3 + [0.85**2 * 1e-3] * 3)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"epoch_decay": 0.0}, "epoch_decay"),
        ({"layout": "stage", "corrections": 2}, "corrects once"),
        ({"stage_weights": {"title": 1}}, "TITLE"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        trained(tmp_path, **changes)


def test_the_config_must_be_ours(tmp_path):
    model, processor = families.llava()
    with pytest.raises(UserError, match="SelfCorrectionSFTConfig"):
        SelfCorrectionSFTTrainer(model, MixtureSFTConfig(str(tmp_path)), processing_class=processor)
    assert len(STAGES) + 1 == len(STAGE_NAMES)
