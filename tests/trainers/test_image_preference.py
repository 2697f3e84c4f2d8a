"""The conditional preference and the anchor of mDPO (arXiv 2406.11839) in `ReflectionDPOTrainer`."""

import random

import families
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image
from training import history, preference, tagged, trainer_of

from vlm_sft_rl.data.collators import PreferenceCollator
from vlm_sft_rl.data.images import random_crop
from vlm_sft_rl.data.rows import PAIR_KINDS
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.trainers.reflection_dpo import ReflectionDPOTrainer

BETA = 0.5


@pytest.fixture
def pairs(tmp_path):
    """Three pairs about pictures with a gradient, so that a part of one looks unlike the whole."""
    rows = []
    for i, weight in enumerate((1.0, 1.0, 0.5)):
        Image.linear_gradient("L").resize((28, 28)).convert("RGB").rotate(90 * i).save(tmp_path / f"{i}.png")
        rows.append(preference(i, tmp_path / f"{i}.png", pair_weight=weight))
    return rows


def made(folder, rows, **settings) -> ReflectionDPOTrainer:
    path = folder / "model"
    if not path.exists():
        families.save(*families.llava(), path)
    options = {"per_device_train_batch_size": 3, "learning_rate": 1e-2, "beta": BETA, "disable_dropout": True}
    mine = trainer_of(
        ReflectionDPOTrainer, folder, rows, path, gradient_checkpointing=False, **(options | settings)
    )
    torch.manual_seed(5)
    with torch.no_grad():  # away from the reference, or every loss is log 2
        for parameter in mine.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    mine.model.eval()
    return mine


@torch.no_grad()
def log_ratios(trainer, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Policy over reference of the chosen and the rejected sides, summed over their tokens."""
    given = {k: v for k, v in batch.items() if not k.startswith("pair_") and k != "completion_mask"}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    policy, reference = (
        model(**given, labels=labels, fused_lm_head=True).log_probs.sum(1)
        for model in (trainer.model, trainer.ref_model)
    )
    return (policy - reference).chunk(2)


@pytest.mark.parametrize(
    ("image_weight", "anchor_weight", "loss"),
    [(1.0, 1.0, "sigmoid"), (0.3, 0.0, "hinge"), (0, 0.7, "sigmoid")],
)
def test_the_loss_is_that_of_its_three_terms(tmp_path, pairs, image_weight, anchor_weight, loss):
    settings = {"image_weight": image_weight, "anchor_weight": anchor_weight, "loss_type": [loss]}
    mine = made(tmp_path, pairs, **settings)
    batch = mine.data_collator(pairs)
    chosen, rejected = log_ratios(mine, batch)
    each = {"sigmoid": lambda m: -F.logsigmoid(m), "hinge": lambda m: torch.relu(1 - m)}[loss]
    preferences, weights = each(BETA * (chosen - rejected)), torch.tensor([1.0, 1.0, 0.5])
    expected = (weights * preferences[:3]).mean() - anchor_weight * F.logsigmoid(BETA * chosen[:3]).mean()
    if image_weight:
        assert chosen[:3].allclose(chosen[3:]) and not rejected[3:].allclose(chosen[3:], atol=1e-4)
        expected = expected + image_weight * (weights * preferences[3:]).mean()
    with torch.no_grad():
        assert float(mine.compute_loss(mine.model, dict(batch))) == pytest.approx(float(expected), rel=1e-5)


def test_both_are_off_by_default_and_then_nothing_is_added(tmp_path, pairs):
    mine = made(tmp_path, pairs)
    batch = mine.data_collator(pairs)
    assert len(batch["input_ids"]) == 6 and batch["pair_weight"].tolist() == [1, 1, 0.5]


def test_a_row_gives_a_pair_of_its_picture_and_a_part_of_it(pairs):
    pairs[1]["images"] = []
    processor = families.llava()[1]
    collate = PreferenceCollator(processor, image_weight=0.5)
    batch = collate(pairs)
    kinds = [PAIR_KINDS[kind] for kind in batch["pair_kind"]]
    assert kinds == ["other"] * 3 + ["image"] * 2
    # five pairs for three rows
    assert batch["pair_weight"].tolist() == pytest.approx([w * 5 / 3 for w in (1, 1, 0.5, 0.5, 0.25)])
    chosen, rejected = batch["input_ids"].chunk(2)
    assert chosen[3:].equal(chosen[[0, 2]]) and rejected[3:].equal(chosen[[0, 2]])
    seen, damaged = batch["pixel_values"].chunk(2)
    assert seen[2:].equal(seen[:2]) and damaged[:2].equal(seen[:2])
    assert not any(part.allclose(whole) for part, whole in zip(damaged[2:], seen[2:], strict=True))
    assert all(value.equal(batch[name]) for name, value in collate(pairs).items())
    other = PreferenceCollator(processor, image_weight=0.5, seed=1)(pairs)["pixel_values"]
    assert not other.equal(batch["pixel_values"])


def test_a_crop_is_a_small_part_enlarged():
    # every pixel says where it stands
    picture = Image.merge(
        "RGB", [Image.linear_gradient("L"), Image.linear_gradient("L").rotate(90), Image.new("L", (256, 256))]
    )
    rng = random.Random(0)
    for _ in range(20):
        part = random_crop(picture, 0.2, rng)
        assert part.size == picture.size
        spans = [high - low for low, high in part.getextrema()[:2]]
        assert max(spans) <= 256 * 0.2**0.5 + 2
    assert random_crop(Image.new("RGB", (3, 1)), 0.2, rng).size == (3, 1)


def test_training_learns_to_look(tmp_path, pairs):
    mine = made(tmp_path, pairs, image_weight=1.0, anchor_weight=1.0, max_steps=8)
    mine.train()
    losses, margins = history(mine, "loss"), history(mine, "rewards/margins_image")
    assert losses[-1] < losses[0] and margins[-1] > margins[0] and margins[-1] > 0


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"image_weight": 1.0, "loss_type": ["ipo"]}, "`image_weight` is defined for"),
        ({"anchor_weight": 1.0, "use_weighting": True}, "`anchor_weight` goes with plain DPO only"),
        ({"image_crop": 0.0}, "`image_crop` is 0.0"),
        ({"image_weight": -1.0}, "`image_weight` is -1.0"),
        ({"anchor_weight": float("nan")}, "`anchor_weight` is nan"),
        ({"verdict_weight": -0.1}, "`verdict_weight` is -0.1"),
    ],
)
def test_bad_settings(tmp_path, pairs, settings, complaint):
    with pytest.raises(UserError, match=complaint):
        made(tmp_path, pairs, **settings)


def test_half_a_pair_is_not_left_out(tmp_path):
    with pytest.raises(UserError, match="half a pair cannot be left out"):
        PreferenceCollator(families.llava()[1], rejects_path=tmp_path / "rejects.jsonl")


@pytest.mark.parametrize("settings", [{"image_weight": 1.0}, {"phrases_only": True}])
def test_a_collator_with_other_settings_is_refused(tmp_path, pairs, settings):
    model, processor = tagged()
    families.save(model, processor, tmp_path / "model")
    with pytest.raises(
        UserError, match=rf"`{next(iter(settings))}` is .*, and that of the collator (0.0|False)"
    ):
        ReflectionDPOTrainer(
            str(tmp_path / "model"),
            None,
            ReflectionDPOTrainer.CONFIG(str(tmp_path / "out"), use_cpu=True, **settings),
            data_collator=PreferenceCollator(processor),
            train_dataset=Dataset.from_list(pairs),
        )
