from dataclasses import fields
from io import StringIO

import pytest
import torch
from rich.console import Console

from vlm_sft_rl.data.chat import load_processor
from vlm_sft_rl.demos import sc_tune as demo_sc_tune
from vlm_sft_rl.demos.sc_tune import BASE, VARIANTS, SCTune, overrides, phase_steps, supervised_steps
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.io import write_jsonl
from vlm_sft_rl.methods.sc_tune import load_regions
from vlm_sft_rl.models.load import load_model
from vlm_sft_rl.pocket import regions
from vlm_sft_rl.pocket.regions import DESCRIBE, LOCATE, build_regions, scenes_of
from vlm_sft_rl.pocket.warmup import warm_up
from vlm_sft_rl.recipes import load_recipe
from vlm_sft_rl.trainers.sc_tune.config import SCTuneConfig

KEYS = {"self_consistency_iou", "rec_acc50", "reg_exact", "caption_chair_i"}


def test_the_control_makes_as_many_updates_as_the_loop():
    # the recipe: 20 describer steps of two updates, 60 locator steps of one
    assert [supervised_steps(n) for n in (1, 20, 21, 80, 100, 480)] == [2, 40, 41, 100, 140, 600]
    assert [phase_steps(n) for n in (1, 20, 21, 80, 100, 480)] == [
        (1, 0), (20, 0), (20, 1), (20, 60), (40, 60), (120, 360)
    ]  # fmt: skip


@pytest.mark.slow
def test_the_demo_runs_through_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setitem(regions.SIZES, "warmup", 20)
    monkeypatch.setitem(regions.SIZES, "train", 40)
    options = {"scenes": 10, "steps": 3, "warm_up_steps": 10, "console": Console(file=StringIO())}
    summary = demo_sc_tune.run(tmp_path, **options)
    for system in ("start", "control", "tuned"):
        assert set(summary[system]) >= KEYS
        for key in KEYS:
            assert (
                summary[system][key]["low"] <= summary[system][key]["value"] <= summary[system][key]["high"]
            )
    assert summary["n"] >= 50
    assert (tmp_path / "report.html").stat().st_size > 10_000
    weights = tmp_path / "models" / "tuned" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    again = demo_sc_tune.run(tmp_path, **options)
    assert again["tuned"] == summary["tuned"] and weights.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="other settings"):
        demo_sc_tune.run(tmp_path, **options | {"seed": 5})


@pytest.mark.parametrize("name", list(VARIANTS))
def test_what_a_variant_changes_are_settings_of_the_trainer(tmp_path, name):
    demo = SCTune(tmp_path, console=Console(file=StringIO()))
    words = overrides(name, demo)
    assert words.keys() <= {field.name for field in fields(SCTuneConfig)}
    recipe = load_recipe(demo_sc_tune.RECIPE_FILE)
    assert not words or any(recipe.get(key) != value for key, value in words.items())


@pytest.mark.slow
def test_variants_run_and_are_compared_with_the_start(tmp_path, monkeypatch):
    monkeypatch.setitem(regions.SIZES, "warmup", 20)
    monkeypatch.setitem(regions.SIZES, "train", 40)
    console = Console(file=StringIO(), width=200)
    options = {"seeds": (0,), "variants": ("rec",), "scenes": 10, "steps": 3}
    summary = demo_sc_tune.reproduce(tmp_path, **options, warm_up_steps=10, console=console)
    assert list(summary["systems"]) == ["start", "control", "rec"]
    for name, row in summary["against_start"].items():
        for key, own in row.items():
            values = [summary["systems"][system][key]["mean"] for system in (name, "start")]
            assert own["mean"] == pytest.approx(values[0] - values[1])
            assert own["seeds"][0]["low"] <= own["mean"] <= own["seeds"][0]["high"]
    assert "minus the start" in console.file.getvalue()


@pytest.mark.slow
def test_without_the_guard_the_reward_is_hacked(tmp_path):
    """A describer that sometimes names the cell learns to do nothing else, unless naming it earns nothing."""
    from vlm_sft_rl.data.collators import RegionCollator
    from vlm_sft_rl.trainers.sc_tune.trainer import SCTuneTrainer

    folder = build_regions(tmp_path / "regions", sizes={"warmup": 1, "train": 60, "val": 1, "test": 1})
    rows = []
    for path, scene in scenes_of(folder).items():
        for number, thing in enumerate(scene.objects):
            said = thing.cell if number % 3 == 0 else thing.noun
            for kind, question, answer in (
                ("describe", DESCRIBE.replace("{box}", thing.cell), said),
                ("copy", LOCATE.replace("{description}", thing.cell), thing.cell),
            ):
                talk = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                rows.append({"id": f"{path}-{thing.cell}-{kind}", "images": [path], "messages": talk})
    write_jsonl(tmp_path / "leaky.jsonl", rows)
    warm_up(BASE, tmp_path / "start", tmp_path / "leaky.jsonl", folder, steps=60)
    rates = {}
    for guard in (True, False):
        torch.manual_seed(0)
        model = load_model(tmp_path / "start", dtype="float32")
        model.model.vision_tower.requires_grad_(False)
        args = SCTuneConfig(
            str(tmp_path / f"guard-{guard}"),
            leak_guard=guard,
            max_steps=16,
            describer_steps=100,
            locator_steps=0,
            learning_rate=3e-4,
            num_generations=4,
            top_p=None,
            top_k=None,
            min_new_tokens=1,
            describe_max_new_tokens=6,
            locate_max_new_tokens=5,
            describe_prompt=DESCRIBE,
            locate_prompt=LOCATE,
            box_convention="pocket",
            per_device_train_batch_size=16,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            weight_decay=0.0,
            logging_steps=4,
            save_strategy="no",
        )
        trainer = SCTuneTrainer(
            model,
            args,
            data_collator=RegionCollator(folder),
            train_dataset=load_regions(folder / "train.jsonl"),
            processing_class=load_processor(tmp_path / "start"),
        )
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "describer/leak_rate" in entry]
        rates[guard] = [entry["describer/leak_rate"] for entry in history]
    assert rates[False][-1] > 0.8 and rates[False][-1] > rates[False][0]
    assert rates[True][-1] < 0.1 and rates[True][-1] < rates[True][0]
