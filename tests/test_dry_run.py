"""`train --dry-run`: checks and figures, and not one weight."""

import json

import families
import pytest
from PIL import Image
from tagged_rows import prepared, write_rows
from training import preference, recipe_of, tagged, written
from typer.testing import CliRunner

from vlm_sft_rl.cli.app import app
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.train import main, parse, run

# the estimate is for the machine that the run is meant for
ON_GPU = {"use_cpu": False, "dtype": "auto"}


def dry(settings: dict, *words, **options):
    return run(settings, *parse(settings, words, "recipe"), dry_run=True, **options)


def tagged_recipe(folder, **changes) -> dict:
    rows = write_rows(folder / "data")
    files = {"train_file": str(rows), "image_root": str(rows.parent)}
    start = {"model_name_or_path": str(folder / "prepared"), "gradient_checkpointing": True}
    return recipe_of(folder, "reverse", [], **files, **start, **ON_GPU, **changes)


def test_without_weights_on_the_disk(tmp_path):
    for file in prepared(tmp_path, "qwen2_5_vl").glob("*.safetensors"):
        file.unlink()
    path = written(tagged_recipe(tmp_path, use_peft=True, lora_r=4), tmp_path)
    words = ["train", path, "--dry-run", "--accelerate-config", "zero2", "--num-processes", "4"]
    result = CliRunner().invoke(app, words)
    said = " ".join(result.stderr.split())
    assert result.exit_code == 0, said
    for part in ("per GPU in GiB, 4 GPUs", "zero2", "fsdp2", "image tokens", "ready for the first step"):
        assert part in said, part
    assert "zero3 is refused for this recipe" in said
    assert not (tmp_path / "out").exists()


def test_verdicts_are_kept_with_tags_and_whole_weights_alone(tmp_path):
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    families.save(*families.llava(), tmp_path / "model")
    settings = recipe_of(tmp_path, "reflection_dpo", [preference(0, "a.png")], verdict_weight=1.0)
    with pytest.raises(UserError, match="verification tokens"):
        dry(settings, gpus=2)
    families.save(*tagged(), tmp_path / "model")
    assert set(dry(settings, gpus=2)["refused"]) == {"zero3", "fsdp2"}
    assert dry(settings | {"verdict_weight": 0.0}, gpus=2)["refused"] == {}
    with pytest.raises(UserError, match="`verdict_weight` is -1"):
        dry(settings | {"verdict_weight": -1})


def region_recipe(folder, family: str, **changes) -> dict:
    source = families.save(*getattr(families, family)(), folder / "model")
    for file in source.glob("*.safetensors"):
        file.unlink()
    Image.new("RGB", (56, 56)).save(folder / "a.png")
    row = {"id": "1", "image": "a.png", "width": 56, "height": 56, "box": [1, 2, 30, 40]}
    return recipe_of(folder, "sc_tune", [row], **ON_GPU, bf16=False, **changes)


def test_sc_tune_without_weights_on_the_disk(tmp_path):
    settings = region_recipe(tmp_path, "llava")
    report = dry(settings, gpus=2)
    assert set(report["refused"]) == {"zero3", "fsdp2"}
    anchored = settings | {"kl_anchor": "start"}
    more = dry(anchored, gpus=2)
    trained = sum(part["trainable"] for part in report["parameters"].values())
    # the frozen copy is in both; the copy of the start comes on top
    assert more["memory"]["ddp"].weights - report["memory"]["ddp"].weights == 4 * trained
    assert report["supervised_tokens"] > 0 and report["image_tokens"] == 4


def test_a_describer_pass_holds_all_samples_of_its_boxes(tmp_path):
    settings = region_recipe(tmp_path, "llava")
    changes = {
        "one": {},
        "four": {"num_generations": 4},
        "eight rows": {"per_device_train_batch_size": 8},
        "locator": {"num_generations": 4, "describer_steps": 0},
    }
    totals = {name: dry(settings | more)["memory"]["ddp"].total for name, more in changes.items()}
    assert totals["four"] == totals["eight rows"] > totals["one"] > totals["locator"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"eval_file": "nowhere.jsonl"}, "nowhere"),
        ({"rec_file": "rows.jsonl"}, "no `expressions`"),
        ({"rewards": ["clip"]}, "'clip' is unknown"),
        ({"rewards": ["iou", "length"], "reward_weights": [1.0]}, "1 weights for 2"),
    ],
)
def test_sc_tune_looks_at_all_that_the_run_will_need(tmp_path, changes, message):
    settings = region_recipe(tmp_path, "llava")
    files = {key: str(tmp_path / value) for key, value in changes.items() if key.endswith("_file")}
    settings |= changes | files
    with pytest.raises(UserError, match=message):
        dry(settings)


def test_sc_tune_names_a_bad_row_of_its_replay(tmp_path):
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    (tmp_path / "replay.jsonl").write_text(json.dumps({"id": "r", "images": ["b.png"], "messages": talk}))
    settings = region_recipe(tmp_path, "llava", replay_file=str(tmp_path / "replay.jsonl"))
    with pytest.raises(UserError, match=r"replay\.jsonl:1.*b\.png"):
        dry(settings)


def test_sc_tune_says_which_family_it_cannot_decode(tmp_path):
    settings = region_recipe(tmp_path, "mllama", box_convention="llava")
    with pytest.raises(UserError, match="cross-attention"):
        dry(settings)


def test_checkpointing_and_batch_change_the_activations_only(tmp_path):
    prepared(tmp_path)
    settings = tagged_recipe(tmp_path)
    changes = {
        "base": (),
        "off": ("--gradient_checkpointing", "false"),
        "four": ("--per_device_train_batch_size", "4"),
    }
    reports = {name: dry(settings, *words)["memory"]["ddp"] for name, words in changes.items()}
    assert reports["off"].activations > reports["base"].activations
    assert reports["four"].activations == pytest.approx(2 * reports["base"].activations, rel=0.01)
    assert reports["off"].weights == reports["four"].weights == reports["base"].weights


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--model_name_or_path", "absent"], "absent"),
        (["--train_file", "absent.json"], "absent.json"),
        (["--packing", "true"], "packing"),
        (["--max_length", "5"], "the limit is 5"),
        (["--lora_target_modules", "nothing", "--use_peft", "true"], "nothing"),
        (["--gpus", "0"], "at least 1"),
        (["--eval_strategy", "epoch"], "needs `eval_file`"),
        (["--freeze_language", "true", "--train_projector", "false"], "nothing is trained"),
    ],
)
def test_what_would_stop_the_run_stops_here(tmp_path, capsys, words, complaint):
    prepared(tmp_path)
    path = written(tagged_recipe(tmp_path), tmp_path)
    assert main(["--config", path, "--dry-run", *words]) == 2
    message = capsys.readouterr().err
    assert complaint in message and "Traceback" not in message and message.count("Error:") == 1
