"""The stages of a round as `vlm_sft_rl.train` runs them: recipe file in, checkpoint out."""

import families
import pytest
from PIL import Image
from safetensors.torch import load_file
from training import recipe_of, written

from vlm_sft_rl import train
from vlm_sft_rl.models.sidecar import read_sidecar


@pytest.fixture
def world(tmp_path):
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
    return tmp_path, {"sft": sft, "reflection_dpo": pairs, "r3v": sft}


def run(world, method, **settings):
    folder, rows = world
    settings = {"max_steps": 2, "learning_rate": 0.01, **settings}
    return train.main(["--config", written(recipe_of(folder, method, rows[method], **settings), folder)])


@pytest.mark.parametrize("method", ["sft", "reflection_dpo", "r3v"])
def test_full_training_changes_the_language_model_alone(world, method):
    assert run(world, method, train_projector=False) == 0
    before, after = (load_file(world[0] / name / "model.safetensors") for name in ("model", "out"))
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved and all("language_model" in name or "lm_head" in name for name in moved), moved
    assert read_sidecar(world[0] / "out").recipe["method"] == method


@pytest.mark.parametrize("method", ["sft", "reflection_dpo"])
def test_lora_writes_an_adapter_and_no_reference_beside_it(world, method):
    assert run(world, method, use_peft=True, lora_r=4) == 0
    assert (world[0] / "out" / "adapter_model.safetensors").is_file()
    assert not (world[0] / "out" / "ref").exists()


def test_pairs_that_cannot_be_used_are_one_message(world, capfd):
    pair = world[1]["reflection_dpo"][2]
    pair["rejected"] = pair["chosen"]
    assert run(world, "reflection_dpo") == 2
    assert ".jsonl:3: `chosen` and `rejected` are equal" in capfd.readouterr().err
    assert run(world, "reflection_dpo", on_bad_row="skip") == 2
    assert "half a pair cannot be left out" in capfd.readouterr().err
