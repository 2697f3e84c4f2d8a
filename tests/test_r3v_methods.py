"""The stages of a round as `vlm_sft_rl.train` runs them: recipe file in, checkpoint out."""

import json

import families
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from vlm_sft_rl import train
from vlm_sft_rl.models.sidecar import read_sidecar

COMMON = {
    "dtype": "float32",
    "use_cpu": True,
    "max_steps": 2,
    "learning_rate": 0.01,
    "per_device_train_batch_size": 2,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "logging_steps": 1,
}


@pytest.fixture
def folder(tmp_path):
    families.save(*families.llava(), tmp_path / "model")
    sft, pairs = [], []
    for i in range(4):
        Image.new("RGB", (28, 28), (60 * i, 10, 90)).save(tmp_path / f"{i}.png")
        ask, right, wrong = (
            {"role": role, "content": text}
            for role, text in (("user", "How many?"), ("assistant", "one"), ("assistant", "two or three"))
        )
        row = {"id": f"r{i}", "images": [f"{i}.png"]}
        sft.append({**row, "messages": [ask, {**right, "answer_type": "cot"}]})
        pairs.append({**row, "prompt": [ask], "chosen": [right], "rejected": [wrong], "pair_kind": "cot"})
    for name, rows in (("sft", sft), ("reflection_dpo", pairs), ("r3v", sft)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(folder, method, **settings):
    recipe = {
        "method": method,
        "model_name_or_path": str(folder / "model"),
        "train_file": str(folder / f"{method}.jsonl"),
        "output_dir": str(folder / "out"),
        **COMMON,
        **settings,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return train.main(["--config", str(path)])


@pytest.mark.parametrize("method", ["sft", "reflection_dpo", "r3v"])
def test_full_training_changes_the_language_model_alone(folder, method):
    assert run(folder, method, train_projector=False) == 0
    before, after = (load_file(folder / name / "model.safetensors") for name in ("model", "out"))
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved and all("language_model" in name or "lm_head" in name for name in moved), moved
    assert read_sidecar(folder / "out").recipe["method"] == method


@pytest.mark.parametrize("method", ["sft", "reflection_dpo"])
def test_lora_writes_an_adapter_and_no_reference_beside_it(folder, method, capfd):
    assert run(folder, method, use_peft=True, lora_r=4) == 0
    assert (folder / "out" / "adapter_model.safetensors").is_file()
    assert not (folder / "out" / "ref").exists()


def test_pairs_that_cannot_be_used_are_one_message(folder, capfd):
    path = folder / "reflection_dpo.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[2]["rejected"] = rows[2]["chosen"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(folder, "reflection_dpo") == 2
    assert "row 3: `chosen` and `rejected` are equal" in capfd.readouterr().err
    assert run(folder, "reflection_dpo", on_bad_row="skip") == 2
    assert "half a pair cannot be left out" in capfd.readouterr().err
