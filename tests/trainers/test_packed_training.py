"""Whole training runs with `vision_packing`: the same as padded ones, resumable, and refused where impossible."""

import copy

import families
import pytest
from datasets import Dataset, IterableDataset
from image_rows import tagged_rows
from training import arguments, history, moved, tagged, trainable, trainer_of, weights

from vlm_sft_rl.data.collators import VisionCollator
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.models.load import VLMModelConfig
from vlm_sft_rl.models.lora import build_peft_config
from vlm_sft_rl.packing.collator import PackedCollator
from vlm_sft_rl.packing.trainer import PackingMixin
from vlm_sft_rl.trainers.mixture_sft import MixtureSFTTrainer
from vlm_sft_rl.trainers.verification_sft import VerificationSFTConfig, VerificationSFTTrainer, build_collator

ORDER = {"per_device_train_batch_size": 4, "train_sampling_strategy": "sequential"}


def made(folder, pair, rows, **settings) -> VerificationSFTTrainer:
    settings = {**ORDER, "gradient_accumulation_steps": 2, **settings}
    pair = copy.deepcopy(pair[0]), pair[1]
    return trainer_of(settings.pop("trainer", VerificationSFTTrainer), folder, rows, pair, **settings)


def trained(folder, pair, rows, resume=None, **settings):
    trainer = made(folder, pair, rows, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def batch_lengths(trainer) -> list[int]:
    return [batch["input_ids"].shape[1] for batch in trainer.get_train_dataloader()]


@pytest.mark.parametrize("packing", ["rows", "image"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_packed_run_is_the_padded_run(tmp_path, family, packing):
    """Weights on closing tags, doubts, hints, gradient accumulation, verdict metrics: all as without packing."""
    pair, rows = tagged(family), tagged_rows(pictures=4, each=4)
    for number, row in enumerate(rows):
        row["messages"][1] |= {"answer_type": "general_answer", "hint": "a cat"}
        if number % 3 == 0:
            row["messages"][1]["doubts"] = [0.3] * row["messages"][1]["content"].count("<SPAN>")
    dataset = order = Dataset.from_list(rows)
    # with Adam a gradient of 1e-9 would move a weight by a whole step
    settings = {"close_tag_weight": 2.5, "hint_probability": 0.5, "optim": "sgd", "learning_rate": 0.1}
    packed = trained(tmp_path / "a", pair, dataset, vision_packing=packing, **settings)
    if packing == "image":
        assert sorted(map(len, packed._packs.plan)) == [4, 4, 4, 4]
        order = dataset.select([i for pack in packed._packs.plan for i in pack])
    padded = trained(tmp_path / "b", pair, order, **settings)
    for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "verdict_accuracy"):
        assert history(packed, key) == pytest.approx(history(padded, key), abs=1e-5), key
    for key in ("p_unconfident/on_confident", "p_unconfident/on_unconfident"):
        assert history(packed, key) == pytest.approx(history(padded, key), abs=1e-6), key
    for (name, one), other in zip(packed.model.named_parameters(), padded.model.parameters(), strict=True):
        assert (one - other).abs().max() < 1e-6, name
    share = history(packed, "packed_tokens_share")
    assert all(s < 0.75 for s in share) if packing == "image" else all(0.75 < s < 1 for s in share)
    if packing == "rows":
        assert history(packed, "num_tokens") == history(padded, "num_tokens")


def test_lora_and_checkpointing_train_packed(tmp_path):
    losses = {}
    for packing in ("none", "image"):
        pair = tagged()
        ids = pair[1].tokenizer.convert_tokens_to_ids(["<SPAN>", "</CN>", "</UN>"])
        lora = VLMModelConfig(use_peft=True, lora_r=4, lora_dropout=0.0)
        settings = {"gradient_checkpointing": True, "vision_packing": packing, "max_steps": 2}
        peft_config = build_peft_config(pair[0], lora, ids)
        trainer = made(tmp_path, pair, tagged_rows(2, 4), peft_config=peft_config, **settings)
        before = weights(trainer.model)
        trainer.train()
        assert moved(before, trainer.model) == trainable(trainer.model)
        losses[packing] = sum(history(trainer, "loss"))
    assert losses["image"] == pytest.approx(losses["none"], rel=0.05)


FILLED = {"vision_packing": "image", "per_device_train_batch_size": 1}


def test_a_resumed_run_is_the_uninterrupted_run(tmp_path):
    pair, rows = tagged(), tagged_rows(pictures=6, each=3)
    settings = {**FILLED, "vision_packing_tokens": 400, "train_sampling_strategy": "random", "max_steps": 6}
    settings |= {"save_strategy": "steps", "save_steps": 4}
    whole = trained(tmp_path / "whole", pair, rows, **settings)
    checkpoint = str(tmp_path / "whole/out/checkpoint-4")
    again = trained(tmp_path / "again", pair, rows, resume=checkpoint, **settings)
    assert len(whole._packs) > 2 and whole._packs.plan == again._packs.plan
    assert whole.state.epoch > 1, "the order of the second epoch is another, and is gone through again"
    assert not moved(weights(whole.model), again.model)


def test_packs_are_filled_by_tokens(tmp_path):
    counts = {}
    for packing in ("rows", "image"):
        settings = {**FILLED, "vision_packing_tokens": 500, "vision_packing": packing}
        lengths = batch_lengths(made(tmp_path, tagged(), tagged_rows(pictures=6, each=4), **settings))
        assert max(lengths) <= 500
        counts[packing] = len(lengths)
    assert counts["image"] < counts["rows"] < 24


def test_rows_with_other_words_before_their_image_are_counted_apart(tmp_path):
    rows = tagged_rows(pictures=1, each=4)
    for i, row in enumerate(rows):
        row["messages"][0]["content"] = f"{'So ' * i}<image>\nWhat?"
    lengths = batch_lengths(made(tmp_path, tagged(), rows, vision_packing_tokens=250, **FILLED))
    assert max(lengths) <= 250 < sum(lengths)


def test_evaluation_is_packed_too(tmp_path):
    pair, dataset = tagged(), Dataset.from_list(tagged_rows(2, 4))
    settings = {"eval_dataset": dataset, "per_device_eval_batch_size": 4}
    losses = [
        made(tmp_path, pair, dataset, vision_packing=packing, **settings).evaluate()["eval_loss"]
        for packing in ("none", "image")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_kinds_of_rows_are_told_apart_in_packs(tmp_path):
    """Weights and logged losses of `MixtureSFTTrainer`, with rows of one kind apart from each other in the pack."""
    pair, rows = families.llava(), tagged_rows(pictures=2, each=4)
    for i, row in enumerate(rows):
        row["messages"][1]["answer_type"] = ("cot", "select", "direct")[i % 3]
    rows = [rows[i] for i in (0, 4, 1, 5, 2, 6, 3, 7)]
    settings = {"max_steps": 1, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    settings |= {"trainer": MixtureSFTTrainer, "kind_weights": {"select": 3.0}, "pad_to_multiple_of": 16}
    losses = []
    for packing in ("none", "rows", "image"):
        trainer = trained(tmp_path, pair, rows, vision_packing=packing, **settings)
        keys = ("loss", "loss/cot", "loss/select", "loss/direct")
        losses.append([value for key in keys for value in history(trainer, key)])
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], abs=1e-5) and losses[2] == pytest.approx(losses[0], abs=1e-5)


def test_families_that_cannot_are_refused_before_step_1(tmp_path, monkeypatch):
    pair, rows = tagged("paligemma"), tagged_rows(1, 4)
    refused = pytest.raises(UserError, match=r"not possible with PaliGemma.*vision_packing: none")
    with refused:
        made(tmp_path, pair, rows, vision_packing="rows")
    # under FSDP and DeepSpeed the model can only be asked once it is wrapped
    prove = PackingMixin.prove_packing
    monkeypatch.setattr(
        PackingMixin, "prove_packing", lambda self, model: setattr(self, "_packing_unproved", True)
    )
    trainer = made(tmp_path, pair, rows, vision_packing="rows")
    monkeypatch.setattr(PackingMixin, "prove_packing", prove)
    with refused:
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"vision_packing": "all"}, "must be one of none, rows, image"),
        ({"vision_packing_tokens": 100}, "needs `vision_packing"),
        ({"vision_packing": "rows", "vision_packing_tokens": 100}, "Set it to 1"),
        ({"vision_packing": "image", "train_sampling_strategy": "group_by_length"}, "chooses rows by length"),
        ({"vision_packing": "rows", "data_collator": VisionCollator}, "packs 'none'"),
        ({"vision_packing": "none", "data_collator": PackedCollator}, "packs 'rows'"),
    ],
)
def test_settings_that_exclude_each_other(tmp_path, settings, complaint):
    pair = tagged()
    if "data_collator" in settings:
        settings = {**settings, "data_collator": settings["data_collator"](pair[1])}
    with pytest.raises(UserError, match=complaint):
        made(tmp_path, pair, tagged_rows(1, 4), **settings)


def test_batches_that_would_be_cut_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(VerificationSFTConfig, "world_size", 2)
    settings = {"vision_packing": "rows", "accelerator_config": {"split_batches": True}}
    with pytest.raises(UserError, match="a pack cannot be cut"):
        made(tmp_path, tagged(), tagged_rows(1, 4), **settings)


def test_a_stream_cannot_be_grouped(tmp_path):
    pair, stream = tagged(), IterableDataset.from_generator(lambda: iter(tagged_rows(1, 4)))
    with pytest.raises(UserError, match="streamed"):
        made(tmp_path, pair, stream, vision_packing="image", train_sampling_strategy="random")
    once = {"max_steps": 1, "gradient_accumulation_steps": 1}
    assert history(trained(tmp_path, pair, stream, vision_packing="rows", **once), "packed_tokens_share")


def test_nothing_to_share_is_said(tmp_path, caplog):
    made(tmp_path, tagged(), tagged_rows(4, 1), vision_packing="image")
    assert "No two rows are about the same image" in caplog.text


def test_the_recipe_key_makes_the_packed_collator(tmp_path):
    _, processor = tagged()
    packed, padded = (
        build_collator(processor, arguments(VerificationSFTTrainer, tmp_path, vision_packing=packing))
        for packing in ("image", "none")
    )
    assert isinstance(packed, PackedCollator) and packed.packing == "image" and type(padded) is VisionCollator
