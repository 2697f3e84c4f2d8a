import families
import pytest
import torch
from PIL import Image
from training import history, moved, trainer_of, weights, without
from trl import SFTTrainer

from vlm_sft_rl.errors import RowError, UserError
from vlm_sft_rl.trainers.mixture_sft import ROW_KINDS, KindCollator, MixtureSFTTrainer, kind_marks


def row(number, kind, answer, image):
    return {
        "id": f"r{number}",
        "images": [image],
        "messages": [
            {"role": "user", "content": "How many?"},
            {"role": "assistant", "content": answer, "answer_type": kind},
        ],
    }


def kind_of(row) -> str:
    return row["messages"][1]["answer_type"]


@pytest.fixture
def rows(tmp_path):
    mixture = []
    for i, kind in enumerate(("direct", "cot", "select", "cot")):
        Image.new("RGB", (28, 28), (60 * i, 10, 90)).save(tmp_path / f"{i}.png")
        mixture.append(row(i, kind, "one two three"[: 3 + 3 * i], str(tmp_path / f"{i}.png")))
    return mixture


def made(rows, folder, pair=None, **settings) -> MixtureSFTTrainer:
    settings = {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2, **settings}
    return trainer_of(MixtureSFTTrainer, folder, rows, pair or families.llava(), **settings)


def loss_of(trainer, rows) -> torch.Tensor:
    trainer.model.eval()
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, trainer.data_collator(rows))


def tokens_of(trainer, row) -> int:
    return int((trainer.data_collator([row])["labels"][:, 1:] != -100).sum())


@pytest.mark.parametrize("family", [families.llava, families.qwen2_5_vl])
def test_with_weights_of_one_the_loss_is_trls_own(family, rows, tmp_path):
    trainer = made(rows, tmp_path, family())
    batch = without(trainer.data_collator(rows), "loss_weights", "row_kind")
    ours = loss_of(trainer, rows)
    with torch.no_grad():
        assert torch.equal(ours, SFTTrainer.compute_loss(trainer, trainer.model, batch))


def test_kind_weights_scale_the_loss_of_their_rows(rows, tmp_path):
    pair = families.llava()
    plain, heavy, off = (
        made(rows, tmp_path, pair, kind_weights=weights) for weights in (None, {"cot": 3.0}, {"cot": 0.0})
    )
    cot, others = ([r for r in rows if (kind_of(r) == "cot") == side] for side in (True, False))
    assert loss_of(heavy, cot) == pytest.approx(3 * float(loss_of(plain, cot)), rel=1e-5)
    assert torch.equal(loss_of(heavy, others), loss_of(plain, others))
    total = sum(float(loss_of(plain, [r])) * tokens_of(plain, r) for r in others)
    expected = total / sum(tokens_of(plain, r) for r in rows)
    assert float(loss_of(off, rows)) == pytest.approx(expected, rel=1e-4)


def test_training_moves_the_language_model_and_logs_every_kind(rows, tmp_path):
    trainer = made(rows, tmp_path)
    before = weights(trainer.model)
    trainer.train()
    assert any("language_model" in name for name in moved(before, trainer.model))
    counts = dict.fromkeys(("direct", "cot", "select"), 0)
    for r in rows:
        counts[kind_of(r)] += tokens_of(trainer, r)
    mean = sum(history(trainer, f"loss/{kind}")[0] * n for kind, n in counts.items()) / sum(counts.values())
    assert history(trainer, "loss")[0] == pytest.approx(mean, rel=1e-3)
    assert not history(trainer, "loss/refine")


def test_batches_name_the_kind_of_every_row(rows):
    collator = KindCollator(families.llava()[1])
    unknown = row(9, "riddle", "x", rows[0]["images"][0])
    kinds = collator([*rows, unknown])["row_kind"].tolist()
    assert kinds == [*map(ROW_KINDS.index, ("direct", "cot", "select", "cot")), len(ROW_KINDS)]


def test_verdicts_that_are_not_to_be_taught_are_not_taught_as_letters(rows, tmp_path):
    collator = made(rows, tmp_path).data_collator
    answer = rows[0]["messages"][1]
    answer |= {"content": "A cup.", "doubts": []}
    assert collator([rows[0]])["loss_weights"].sum() > 0  # there is nothing to leave out
    answer |= {"content": "<SPAN> A cup </CN>.", "doubts": [0.1]}
    with pytest.raises(RowError, match=r"r0: verification tags with `doubts`.*the tokenizer lacks"):
        collator([rows[0]])


def test_bad_settings(rows, tmp_path):
    with pytest.raises(UserError, match="'cott' is not one of"):
        kind_marks({"cott": 1})
    with pytest.raises(UserError, match="number >= 0"):
        kind_marks({"cot": -1})
    with pytest.raises(UserError, match="packing"):
        made(rows, tmp_path, packing=True)
    with pytest.raises(UserError, match="the limit is 5"):
        made(rows, tmp_path, max_length=5)
