"""Whole training runs with `vision_packing`: the same as padded ones, resumable, and refused where impossible."""

import copy

import families
import pytest
import torch
from datasets import Dataset, IterableDataset
from image_rows import tagged_rows

from vlm_sft_rl.data.collators import VisionCollator
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.models.tokens import add_verification_tokens
from vlm_sft_rl.packing.collator import PackedCollator
from vlm_sft_rl.packing.trainer import PackingMixin
from vlm_sft_rl.trainers.mixture_sft import MixtureSFTConfig, MixtureSFTTrainer
from vlm_sft_rl.trainers.verification_sft import VerificationSFTConfig, VerificationSFTTrainer, build_collator


def settings(folder, **changes):
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        **changes,
    }


def built(family="llava"):
    model, processor = getattr(families, family)()
    add_verification_tokens(model, processor)
    return model, processor


def trained(folder, model, processor, rows, resume=None, **changes):
    trainer = VerificationSFTTrainer(
        copy.deepcopy(model),
        VerificationSFTConfig(**settings(folder, **changes)),
        train_dataset=rows,
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def history(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def same_weights(a, b, tolerance):
    pairs = zip(a.model.state_dict().items(), b.model.state_dict().values(), strict=True)
    return all(torch.allclose(x, y, atol=tolerance) for (_, x), y in pairs)


@pytest.mark.parametrize("packing", ["rows", "image"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_packed_run_is_the_padded_run(tmp_path, family, packing):
    """Weights on closing tags, hints, gradient accumulation, verdict metrics: all as without packing."""
    model, processor = built(family)
    rows = tagged_rows(pictures=4, each=4)
    for one in rows:
        one["messages"][1] |= {"answer_type": "general_answer", "hint": "a cat"}
    dataset = Dataset.from_list(rows)
    changes = {"close_tag_weight": 2.5, "hint_probability": 0.5}
    packed = trained(tmp_path / "a", model, processor, dataset, vision_packing=packing, **changes)
    order = dataset
    if packing == "image":
        assert sorted(map(len, packed._packs.plan)) == [4, 4, 4, 4]
        order = dataset.select([i for pack in packed._packs.plan for i in pack])
    padded = trained(tmp_path / "b", model, processor, order, **changes)
    for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "verdict_accuracy"):
        assert history(packed, key) == pytest.approx(history(padded, key), abs=1e-5), key
    for key in ("p_unconfident/on_confident", "p_unconfident/on_unconfident"):
        assert history(packed, key) == pytest.approx(history(padded, key), abs=1e-6), key
    # Adam turns a gradient of 1e-9 into a whole step: the weights can differ by a little where there is none
    assert same_weights(packed, padded, 1e-4)
    share = history(packed, "packed_tokens_share")
    assert all(s < 0.75 for s in share) if packing == "image" else all(0.75 < s < 1 for s in share)
    if packing == "rows":
        assert history(packed, "num_tokens") == history(padded, "num_tokens")


def test_lora_and_checkpointing_train_packed(tmp_path):
    from vlm_sft_rl.models.load import VLMModelConfig
    from vlm_sft_rl.models.lora import build_peft_config

    losses = {}
    for packing in ("none", "image"):
        model, processor = built()
        ids = processor.tokenizer.convert_tokens_to_ids(["<SPAN>", "</CN>", "</UN>"])
        args = VerificationSFTConfig(
            **settings(tmp_path, gradient_checkpointing=True, vision_packing=packing, max_steps=2)
        )
        trainer = VerificationSFTTrainer(
            model,
            args,
            train_dataset=Dataset.from_list(tagged_rows(2, 4)),
            processing_class=processor,
            peft_config=build_peft_config(
                model, VLMModelConfig(use_peft=True, lora_r=4, lora_dropout=0.0), ids
            ),
        )
        start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.train()
        moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, start[n])}
        assert moved == {n for n, p in trainer.model.named_parameters() if p.requires_grad}
        losses[packing] = sum(history(trainer, "loss"))
    assert losses["image"] == pytest.approx(losses["none"], rel=0.05)


def test_a_resumed_run_is_the_uninterrupted_run(tmp_path):
    model, processor = built()
    dataset = Dataset.from_list(tagged_rows(pictures=6, each=3))
    changes = {
        "vision_packing": "image",
        "vision_packing_tokens": 400,
        "per_device_train_batch_size": 1,
        "train_sampling_strategy": "random",
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 4,
    }
    whole = trained(tmp_path / "whole", model, processor, dataset, **changes)
    again = trained(
        tmp_path / "again", model, processor, dataset, resume=str(tmp_path / "whole/checkpoint-4"), **changes
    )
    assert len(whole._packs) > 2 and whole._packs.plan == again._packs.plan
    assert whole.state.epoch > 1, "the order of the second epoch is another, and is gone through again"
    assert same_weights(whole, again, 0)


def test_packs_are_filled_by_tokens(tmp_path):
    model, processor = built()
    dataset = Dataset.from_list(tagged_rows(pictures=6, each=4))
    changes = {"vision_packing_tokens": 500, "per_device_train_batch_size": 1, "max_steps": 1}
    counts = {}
    for packing in ("rows", "image"):
        trainer = trained(tmp_path, model, processor, dataset, vision_packing=packing, **changes)
        lengths = []
        for batch in trainer.get_train_dataloader():
            lengths.append(batch["input_ids"].shape[1])
        assert max(lengths) <= 500
        counts[packing] = len(lengths)
    assert counts["image"] < counts["rows"] < 24


def test_rows_with_other_words_before_their_image_are_counted_apart(tmp_path):
    model, processor = built()
    rows = tagged_rows(pictures=1, each=4)
    for i, one in enumerate(rows):
        one["messages"][0]["content"] = f"{'So ' * i}<image>\nWhat?"
    changes = {"vision_packing": "image", "vision_packing_tokens": 250, "per_device_train_batch_size": 1}
    trainer = trained(tmp_path, model, processor, Dataset.from_list(rows), max_steps=1, **changes)
    lengths = [batch["input_ids"].shape[1] for batch in trainer.get_train_dataloader()]
    assert max(lengths) <= 250 < sum(lengths)


def test_batches_that_would_be_cut_are_refused(tmp_path, monkeypatch):
    model, processor = built()
    monkeypatch.setattr(VerificationSFTConfig, "world_size", 2)
    changes = {"vision_packing": "rows", "accelerator_config": {"split_batches": True}}
    with pytest.raises(UserError, match="a pack cannot be cut"):
        trained(tmp_path, model, processor, Dataset.from_list(tagged_rows(1, 4)), **changes)


def test_evaluation_is_packed_too(tmp_path):
    model, processor = built()
    dataset = Dataset.from_list(tagged_rows(2, 4))
    losses = []
    for packing in ("none", "image"):
        trainer = VerificationSFTTrainer(
            copy.deepcopy(model),
            VerificationSFTConfig(**settings(tmp_path, vision_packing=packing, per_device_eval_batch_size=4)),
            train_dataset=dataset,
            eval_dataset=dataset,
            processing_class=processor,
        )
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_families_that_cannot_are_refused_before_step_1(tmp_path):
    model, processor = families.paligemma()
    add_verification_tokens(model, processor)
    with pytest.raises(UserError, match=r"not possible with PaliGemma.*vision_packing: none"):
        trained(tmp_path, model, processor, Dataset.from_list(tagged_rows(1, 4)), vision_packing="rows")


def test_sharded_weights_are_asked_at_the_first_step(tmp_path, monkeypatch):
    """Under FSDP and DeepSpeed the model can only be asked once it is wrapped."""
    model, processor = families.paligemma()
    add_verification_tokens(model, processor)
    asked = PackingMixin.prove_packing
    monkeypatch.setattr(
        PackingMixin, "prove_packing", lambda self, model: setattr(self, "_packing_unproved", True)
    )
    trainer = VerificationSFTTrainer(
        model,
        VerificationSFTConfig(**settings(tmp_path, vision_packing="rows")),
        train_dataset=Dataset.from_list(tagged_rows(1, 4)),
        processing_class=processor,
    )
    monkeypatch.setattr(PackingMixin, "prove_packing", asked)
    with pytest.raises(UserError, match="not possible with PaliGemma"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"vision_packing": "all"}, "must be one of none, rows, image"),
        ({"vision_packing_tokens": 100}, "needs `vision_packing"),
        ({"vision_packing": "rows", "vision_packing_tokens": 100}, "Set it to 1"),
        ({"vision_packing": "image", "train_sampling_strategy": "group_by_length"}, "chooses rows by length"),
        ({"vision_packing": "rows", "collator": VisionCollator}, "packs 'none'"),
        ({"vision_packing": "none", "collator": PackedCollator}, "packs 'rows'"),
    ],
)
def test_settings_that_exclude_each_other(tmp_path, changes, complaint):
    model, processor = built()
    make = changes.pop("collator", None)
    with pytest.raises(UserError, match=complaint):
        VerificationSFTTrainer(
            model,
            VerificationSFTConfig(**settings(tmp_path, **changes)),
            data_collator=make and make(processor),
            train_dataset=Dataset.from_list(tagged_rows(1, 4)),
            processing_class=processor,
        )


def test_kinds_of_rows_are_told_apart_in_packs(tmp_path):
    """Weights and logged losses of `MixtureSFTTrainer`, with rows of one kind apart from each other in the pack."""
    model, processor = families.llava()
    rows = tagged_rows(pictures=2, each=4)
    for i, one in enumerate(rows):
        one["messages"][1]["answer_type"] = ("cot", "select", "direct")[i % 3]
    rows = [rows[i] for i in (0, 4, 1, 5, 2, 6, 3, 7)]
    found = []
    for packing in ("none", "rows", "image"):
        args = MixtureSFTConfig(
            **settings(tmp_path, max_steps=1, per_device_train_batch_size=8, gradient_accumulation_steps=1),
            kind_weights={"select": 3.0},
            vision_packing=packing,
            pad_to_multiple_of=16,
        )
        trainer = MixtureSFTTrainer(
            copy.deepcopy(model), args, train_dataset=Dataset.from_list(rows), processing_class=processor
        )
        trainer.train()
        found.append([history(trainer, key) for key in ("loss", "loss/cot", "loss/select", "loss/direct")])
    for packed in found[1:]:
        assert packed == [pytest.approx(values, abs=1e-5) for values in found[0]]
    assert all(len(values) == 1 for values in found[0])


def test_a_stream_cannot_be_grouped(tmp_path):
    model, processor = built()
    stream = IterableDataset.from_generator(lambda: iter(tagged_rows(1, 4)))
    with pytest.raises(UserError, match="streamed"):
        trained(tmp_path, model, processor, stream, vision_packing="image", train_sampling_strategy="random")
    once = {"max_steps": 1, "gradient_accumulation_steps": 1}
    trainer = trained(tmp_path, model, processor, stream, vision_packing="rows", **once)
    assert history(trainer, "packed_tokens_share")


def test_nothing_to_share_is_said(tmp_path, caplog):
    model, processor = built()
    trained(
        tmp_path, model, processor, Dataset.from_list(tagged_rows(4, 1)), vision_packing="image", max_steps=1
    )
    assert "No two rows are about the same image" in caplog.text


def test_the_recipe_key_makes_the_packed_collator(tmp_path):
    _, processor = built()
    made = build_collator(processor, VerificationSFTConfig(**settings(tmp_path, vision_packing="image")))
    assert isinstance(made, PackedCollator) and made.packing == "image"
    assert type(build_collator(processor, VerificationSFTConfig(**settings(tmp_path)))) is VisionCollator
