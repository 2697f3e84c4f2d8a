import families
import pytest
import torch
from datasets import Dataset
from PIL import Image
from trl import SFTTrainer

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.trainers.mixture_sft import (
    ROW_KINDS,
    KindCollator,
    MixtureSFTConfig,
    MixtureSFTTrainer,
    build_kind_collator,
    kind_marks,
)


def row(number, kind, answer, image):
    return {
        "id": f"r{number}",
        "images": [image],
        "messages": [
            {"role": "user", "content": "How many?"},
            {"role": "assistant", "content": answer, "answer_type": kind},
        ],
    }


@pytest.fixture
def rows(tmp_path):
    found = []
    for i, kind in enumerate(("direct", "cot", "select", "cot")):
        Image.new("RGB", (28, 28), (60 * i, 10, 90)).save(tmp_path / f"{i}.png")
        found.append(row(i, kind, "one two three"[: 3 + 3 * i], str(tmp_path / f"{i}.png")))
    return found


def trainer(pair, rows, folder, **settings):
    model, processor = pair
    options = {
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "warmup_steps": 0,
    }
    args = MixtureSFTConfig(str(folder / "out"), **{**options, **settings})
    return MixtureSFTTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=processor)


def loss_of(trainer, rows, weights=None):
    batch = trainer.data_collator([dict(r) for r in rows])
    trainer.model.eval()
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, batch)


@pytest.mark.parametrize("family", [families.llava, families.qwen2_5_vl])
def test_with_weights_of_one_the_loss_is_trls_own(family, rows, tmp_path, monkeypatch):
    mine = trainer(family(), rows, tmp_path)
    ours = loss_of(mine, rows)
    batch = mine.data_collator([dict(r) for r in rows])
    batch.pop("loss_weights"), batch.pop("row_kind")
    with torch.no_grad():
        stock = SFTTrainer.compute_loss(mine, mine.model, batch)
    assert torch.equal(ours, stock)


def test_kind_weights_scale_the_loss_of_their_rows(rows, tmp_path):
    pair = families.llava()
    plain = trainer(pair, rows, tmp_path)
    cot = [r for r in rows if r["messages"][1]["answer_type"] == "cot"]
    heavy = trainer(pair, rows, tmp_path, kind_weights={"cot": 3.0})
    assert loss_of(heavy, cot) == pytest.approx(3 * float(loss_of(plain, cot)), rel=1e-5)
    others = [r for r in rows if r not in cot]
    assert torch.equal(loss_of(heavy, others), loss_of(plain, others))
    off = trainer(pair, rows, tmp_path, kind_weights={"cot": 0.0})
    tokens = [int((plain.data_collator([r])["labels"][:, 1:] != -100).sum()) for r in rows]
    expected = sum(
        float(loss_of(plain, [r])) * n for r, n in zip(rows, tokens, strict=True) if r not in cot
    ) / sum(tokens)
    assert float(loss_of(off, rows)) == pytest.approx(expected, rel=1e-4)


def test_training_moves_the_language_model_and_logs_every_kind(rows, tmp_path):
    mine = trainer(families.llava(), rows, tmp_path)
    before = {n: p.detach().clone() for n, p in mine.model.named_parameters()}
    mine.train()
    moved = {n for n, p in mine.model.named_parameters() if not torch.equal(p, before[n])}
    assert any("language_model" in n for n in moved)
    first = next(record for record in mine.state.log_history if "loss" in record)
    assert {"loss/direct", "loss/cot", "loss/select"} <= set(first) and "loss/refine" not in first
    counts = dict.fromkeys(("direct", "cot", "select"), 0)
    for r in rows:
        kind = r["messages"][1]["answer_type"]
        counts[kind] += int((mine.data_collator([r])["labels"][:, 1:] != -100).sum())
    mean = sum(first[f"loss/{k}"] * n for k, n in counts.items()) / sum(counts.values())
    assert first["loss"] == pytest.approx(mean, rel=1e-3)


def test_batches_name_the_kind_of_every_row(rows):
    collator = KindCollator(families.llava()[1])
    unknown = row(9, "riddle", "x", rows[0]["images"][0])
    kinds = collator([*rows, unknown])["row_kind"].tolist()
    assert kinds == [*[ROW_KINDS.index(k) for k in ("direct", "cot", "select", "cot")], len(ROW_KINDS)]


def test_bad_settings(rows, tmp_path):
    with pytest.raises(UserError, match="'cott' is not one of"):
        kind_marks({"cott": 1})
    with pytest.raises(UserError, match="number >= 0"):
        kind_marks({"cot": -1})
    with pytest.raises(UserError, match="packing"):
        trainer(families.llava(), rows, tmp_path, packing=True)
    processor = families.llava()[1]
    collator = build_kind_collator(processor, MixtureSFTConfig(str(tmp_path), use_cpu=True, max_length=5))
    with pytest.raises(UserError, match="the limit is 5"):
        collator(rows)
