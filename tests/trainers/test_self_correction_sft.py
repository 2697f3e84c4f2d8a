import copy

import families
import pytest
import torch
from PIL import Image
from training import SETTINGS, arguments, history, moved, trainer_of, weights, without
from trl import SFTConfig, SFTTrainer

from vlm_sft_rl.data.corrections import Draft, correction_row
from vlm_sft_rl.data.stages import STAGES, Staged, format_staged
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.trainers.mixture_sft import MixtureSFTTrainer
from vlm_sft_rl.trainers.self_correction_sft import STAGE_NAMES, SelfCorrectionSFTTrainer

EXTRA = ("loss_weights", "stage_ids", "draft_ids")


def staged(number):
    return format_staged(Staged("count", f"{number} cats", f"so {number}", str(number)))


def rows_in(folder) -> list[dict]:
    rows = []
    for i in range(6):
        path = folder / f"{i}.png"
        Image.new("RGB", (56, 56), (40 * i, 90, 200)).save(path)
        drafts = [Draft(staged(i + i % 2), i % 2 == 0), Draft(staged(i), True)]
        rows.append(correction_row(f"r{i}", [str(path)], "How many cats?", drafts, "check"))
    return rows


def made(folder, pair=None, **settings) -> SelfCorrectionSFTTrainer:
    settings = {"gradient_accumulation_steps": 2, **settings}
    return trainer_of(SelfCorrectionSFTTrainer, folder, rows_in(folder), pair or families.llava(), **settings)


def trained(folder, **settings) -> SelfCorrectionSFTTrainer:
    trainer = made(folder, **settings)
    trainer.train()
    return trainer


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_weights_of_one_are_stock_trl_to_the_last_bit(tmp_path, family):
    model, processor = getattr(families, family)()
    ours = made(tmp_path, (copy.deepcopy(model), processor), attempt_loss="all")
    options = {"bf16": False, "max_length": None, "remove_unused_columns": False}
    stock = SFTTrainer(
        model,
        SFTConfig(
            str(tmp_path / "stock"),
            **SETTINGS,
            **options,
            gradient_accumulation_steps=2,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        data_collator=lambda rows: without(ours.data_collator(rows), *EXTRA),
        train_dataset=ours.train_dataset,
        processing_class=processor,
    )
    for trainer in (ours, stock):
        trainer.train()
    for key in ("loss", "grad_norm", "num_tokens"):
        assert history(ours, key) == history(stock, key) and len(history(ours, key)) == 3
    assert not moved(weights(stock.model), ours.model)


def test_the_loss_and_its_parts_equal_a_slow_reference(tmp_path):
    factors = {"attempt_weight": 0.5, "stage_weights": {"reasoning": 3.0, "other": 0.25}}
    trainer = made(tmp_path, attempt_loss="all", **factors)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad():
        logits = trainer.model.eval()(**without(batch, "labels", *EXTRA)).logits
    logp = logits[:, :-1].log_softmax(-1)
    total, count, parts = 0.0, 0, {}
    for i, j in (batch["labels"][:, 1:] != -100).nonzero().tolist():
        label, stage, draft = (batch[key][i, j + 1].item() for key in ("labels", "stage_ids", "draft_ids"))
        is_last = draft == batch["draft_ids"][i].max().item()
        loss = -logp[i, j, label].item()
        total += loss * (1.0 if is_last else 0.5) * {0: 0.25, 3: 3.0}.get(stage, 1.0)
        count += 1
        for name in (STAGE_NAMES[stage], "correction" if is_last else "attempt"):
            parts.setdefault(name, []).append(loss)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    assert loss.item() == pytest.approx(total / count, rel=1e-5)
    trainer.log({"loss": 0.0})
    (record,) = trainer.state.log_history
    logged = {key.removeprefix("loss/"): value for key, value in record.items() if key.startswith("loss/")}
    assert logged == {name: pytest.approx(sum(ls) / len(ls), rel=1e-5) for name, ls in parts.items()}
    assert set(logged) == {*STAGE_NAMES, "attempt", "correction"}


@pytest.mark.parametrize("attempt_loss", ["none", "right"])
def test_attempts_have_loss_only_where_it_is_asked_for(tmp_path, attempt_loss):
    trainer = trained(tmp_path, attempt_loss=attempt_loss)
    assert history(trainer, "loss/correction")
    assert bool(history(trainer, "loss/attempt")) == (attempt_loss == "right")


def test_every_layout_trains(tmp_path):
    lengths = {}
    for layout, after in (("turn", "CONCLUSION"), ("message", "CONCLUSION"), ("stage", "CAPTION")):
        trainer = trained(tmp_path, layout=layout, correction_after=after, max_steps=1)
        assert torch.isfinite(torch.tensor(history(trainer, "loss"))).all()
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
        made(tmp_path, **changes)


def test_the_config_must_be_ours(tmp_path):
    model, processor = families.llava()
    with pytest.raises(UserError, match="SelfCorrectionSFTConfig"):
        other = arguments(MixtureSFTTrainer, tmp_path)
        SelfCorrectionSFTTrainer(model, other, processing_class=processor)
    assert len(STAGES) + 1 == len(STAGE_NAMES)
