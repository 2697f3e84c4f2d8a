"""What is not finite is neither trained nor saved, by any trainer."""

import json
import re

import families
import pytest
import staged_world
import torch
from image_rows import tagged_rows
from in_processes import correction_rows, preference_rows
from regions import by_length, region_rows
from regions import trainer as region_trainer
from safetensors.torch import load_file
from test_training_processes import launch
from training import moved, tagged, tagged_dataset, trainer_of, weights

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.trainers.grpo import VisionGRPOTrainer
from vlm_sft_rl.trainers.mixture_sft import MixtureSFTTrainer
from vlm_sft_rl.trainers.reflection_dpo import ReflectionDPOTrainer
from vlm_sft_rl.trainers.self_correction_sft import SelfCorrectionSFTTrainer
from vlm_sft_rl.trainers.verification_sft import VerificationSFTTrainer

SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "gradient_checkpointing": False}
# one update moves every weight by 1e30, and no pass through the model is finite after that
EXPLODES = {**SAVING, "learning_rate": 1e30, "max_grad_norm": 0.0}


def grpo(folder, **settings):
    """Questions about pictures that are always answered wrong: the gradient comes from the length."""
    path = staged_world.write_checkpoint(folder / "model")
    rows = [
        {
            "prompt": [{"role": "user", "content": "How many?"}],
            "images": [picture["image"]],
            "row": json.dumps({"id": f"q{i}", "answer": "2"}),
        }
        for i, picture in enumerate(region_rows(4))
    ]
    settings |= {
        "num_generations": 2,
        "max_completion_length": 4,
        "per_device_train_batch_size": 4,
        "beta": 0.0,
    }
    args = VisionGRPOTrainer.CONFIG(str(folder / "out"), use_cpu=True, report_to="none", **settings)
    from datasets import Dataset

    def length(completions, **columns):
        return [float(len(str(completion))) for completion in completions]

    return VisionGRPOTrainer(str(path or folder / "model"), length, args, Dataset.from_list(rows))


def made(name, folder, **settings):
    settings = {**EXPLODES, **settings}
    match name:
        case "verification":
            rows = tagged_rows(pictures=2, each=4)
            return trainer_of(
                VerificationSFTTrainer, folder, rows, tagged(), hint_probability=0.0, **settings
            )
        case "packed":
            rows = tagged_rows(pictures=2, each=4)
            settings |= {"vision_packing": "image", "per_device_train_batch_size": 4}
            return trainer_of(VerificationSFTTrainer, folder, rows, tagged(), **settings)
        case "mixture":
            return trainer_of(
                MixtureSFTTrainer, folder, tagged_rows(pictures=2, each=4), tagged(), **settings
            )
        case "self-correction":
            return trainer_of(
                SelfCorrectionSFTTrainer, folder, correction_rows(), families.llava(), **settings
            )
        case "dpo":
            families.save(*families.llava(), folder / "model")
            return trainer_of(ReflectionDPOTrainer, folder, preference_rows(), folder / "model", **settings)
        case "grpo":
            return grpo(folder, **settings)
        case "describer" | "locator":
            steps = {"describer_steps": int(name == "describer"), "locator_steps": int(name == "locator")}
            rate = settings["learning_rate"]
            settings |= {"reward_funcs": by_length, "inner_epochs": 1}
            return region_trainer(
                folder / "out", rows=region_rows(8), locator_learning_rate=rate, **steps, **settings
            )


@pytest.mark.parametrize(
    "name",
    ["verification", "packed", "mixture", "self-correction", "dpo", "grpo", "describer", "locator"],
)
def test_every_trainer_stops_before_the_update_and_names_the_rows(tmp_path, name):
    trainer = made(name, tmp_path)
    with pytest.raises(UserError, match=r"Step [23]: the (loss|gradient|logits)") as stopped:
        trainer.train()
    row = {"dpo": r"row p\d", "grpo": r"row q\d", "self-correction": r"row r\d"}.get(name, r"row r?\d")
    assert re.search(rf"Its rows: {row}", str(stopped.value)), stopped.value
    step = trainer.state.global_step
    assert f"Step {step + 1}:" in str(stopped.value)
    # the weights are those of the last checkpoint, which is whole and finite, and there is no later one
    (last,) = sorted((tmp_path / "out").glob("checkpoint-*"))[-1:]
    assert last.name == f"checkpoint-{step}"
    saved = load_file(last / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())
    total = sum(float(p.detach().double().abs().sum()) for p in trainer.model.parameters())
    again = type(trainer.plain_model).from_pretrained(last, dtype=torch.float32)
    assert total == pytest.approx(sum(float(p.detach().double().abs().sum()) for p in again.parameters()))


def poisoned(trainer, rows: set[str]):
    """The trainer, whose collator gives the labels of these rows a weight that is no number."""
    collate = trainer.data_collator

    def collator(features):
        batch = collate(features)
        for i, feature in enumerate(features):
            if feature["id"] in rows:
                batch["loss_weights"][i] = torch.nan
        return batch

    collator.rejects, collator.packing = None, "none"
    trainer.data_collator = collator
    return trainer


def test_of_accumulated_batches_the_one_at_fault_is_named(tmp_path):
    rows = tagged_rows(pictures=4, each=4)
    settings = {
        **SAVING,
        "gradient_accumulation_steps": 4,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-3,
    }
    trainer = poisoned(
        trainer_of(VerificationSFTTrainer, tmp_path, rows, tagged(), **settings), {rows[5]["id"]}
    )
    before = weights(trainer.model)
    with pytest.raises(UserError, match=r"the loss is not finite") as stopped:
        trainer.train()
    assert f"Its rows: row {rows[5]['id']}. " in str(stopped.value)
    step = trainer.state.global_step
    assert bool(moved(before, trainer.model)) == (step > 0)
    assert not any("loss" in entry and entry["step"] > step for entry in trainer.state.log_history)


def test_a_gradient_alone_stops_it_too_and_nothing_moves(tmp_path):
    trainer = made("verification", tmp_path, learning_rate=1e-3)
    before = weights(trainer.model)
    hooked = next(p for p in trainer.model.parameters() if p.requires_grad)
    hooked.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(UserError, match="Step 1: the gradient is not finite"):
        trainer.train()
    assert not moved(before, trainer.model) and not (tmp_path / "out" / "checkpoint-1").exists()


def test_weights_that_the_last_update_broke_are_not_saved(tmp_path):
    trainer = made("verification", tmp_path, learning_rate=1e39, max_steps=1)
    with pytest.raises(UserError, match="trained weights are not finite, so they are not saved"):
        trainer.train()
    with pytest.raises(UserError, match="not saved"):
        trainer.save_model()
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_weights_that_no_step_would_meet_are_seen_before_the_first(tmp_path):
    trainer = trainer_of(VerificationSFTTrainer, tmp_path, tagged_dataset(tmp_path), tagged())
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[3] = float("nan")
    with pytest.raises(
        UserError, match=r"1 weights .* before the first step: model\.language_model\.embed_tokens"
    ):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("norm", [float("nan"), -1.0])
def test_a_norm_that_clips_nothing_by_mistake_is_refused(norm):
    with pytest.raises(UserError, match=r"`max_grad_norm` is .*, expected a number >= 0"):
        VerificationSFTTrainer.CONFIG("out", use_cpu=True, max_grad_norm=norm)
    assert VerificationSFTTrainer.CONFIG("out", use_cpu=True, max_grad_norm=None).max_grad_norm == 0


def test_a_gradient_scaler_may_leave_updates_out_until_it_cannot_scale_less(tmp_path):
    trainer = made("verification", tmp_path)
    trainer.note_rows({})
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trainer.accelerator.scaler.scale(torch.ones(1))  # it is made at its first use
    trainer.check_update(torch.tensor(torch.inf))
    trainer.accelerator.scaler.update(0.5)
    with pytest.raises(UserError, match="the gradient is not finite"):
        trainer.check_update(torch.tensor(torch.inf))


@pytest.mark.slow
def test_two_processes_stop_together(tmp_path):
    one, other = launch(tmp_path / "two", 2, "poisoned", 2)
    assert one["stopped"] == other["stopped"] and "the loss is not finite" in one["stopped"]
    assert f"row {one['row']}" in one["stopped"]
    assert one["moved"] == other["moved"]
