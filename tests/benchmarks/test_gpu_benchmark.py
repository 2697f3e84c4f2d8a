"""The benchmark for a graphics card, rehearsed without one: every kind of item is done, and the file is complete."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import gpu
import gpu_parts
import pytest

from vlm_sft_rl import recipes

SCALE = 0.02


@pytest.mark.parametrize(
    "name",
    [
        "reverse/llava_1_5_7b_lora",
        pytest.param("reverse/qwen2_5_vl_7b_qlora", marks=pytest.mark.slow),
        pytest.param("r3v/qwen2_vl_7b_lora", marks=pytest.mark.slow),
        pytest.param("reverse/qwen3_vl_4b_lora", marks=pytest.mark.slow),
        pytest.param("sco/llama_3_2v_11b_cot", marks=pytest.mark.slow),
        pytest.param("sc_tune/qwen2_5_vl_3b_lora", marks=pytest.mark.slow),
        pytest.param("rewind/qwen2_5_vl_3b_lora", marks=pytest.mark.slow),
        pytest.param("mdpo/llava_1_5_7b_lora", marks=pytest.mark.slow),
    ],
)
def test_a_step_of_a_recipe(name):
    (item,) = gpu_parts.steps(Namespace(recipes=[name], scale=SCALE, device="cpu"))
    figures = item[1]()
    assert figures["estimate_gib"] > 0 and figures["tokens"] > 50
    sides = ["ours"] if name.startswith(("sc_tune", "rewind", "mdpo")) else ["ours", "trl"]
    for side in sides:
        assert len(figures[side]["steps_s"]) == gpu_parts.STEPS and figures[side]["step_s"] > 0


def test_every_recipe_that_neither_is_a_pocket_one_nor_samples_is_planned_and_one_of_each_kind_first():
    planned = [name for name, _ in gpu_parts.steps(Namespace(recipes=None, scale=1.0, device="cuda"))]
    shipped = {name for name in recipes.names("recipes") if "/pocket" not in name}
    assert shipped - set(planned) == {f"{kind}/qwen2_5_vl_3b_lora" for kind in ("verdicts", "injected")}
    assert planned[: len(gpu_parts.FIRST)] == list(gpu_parts.FIRST)


@pytest.mark.slow
def test_packing_and_decoding():
    options = Namespace(scale=SCALE, device="cpu")
    packing, decoding = dict(gpu_parts.packing(options)), dict(gpu_parts.decoding(options))
    assert list(packing) == [f"{m}, {a}" for a in gpu_parts.ATTENTION for m in ("rows", "image")]
    assert packing["image, sdpa"]()["loss_difference"] < 1e-5
    assert [item()["seconds_an_answer"] > 0 for item in decoding.values()] == 4 * [True]


def run(path: Path, *words: str) -> dict:
    command = [sys.executable, gpu.__file__, "--json", str(path), "--device", "cpu", "--scale", str(SCALE)]
    assert subprocess.run([*command, *words], capture_output=True).returncode == 0
    return json.loads(path.read_text())


def test_an_item_that_fails_ends_no_part_and_the_file_is_complete(tmp_path):
    words = ["--seconds", "800", "--parts", "steps", "engines", "--recipes", "no/such_recipe"]
    result = run(tmp_path / "gpu.json", *words)
    assert result["versions"]["torch"] and "CPU" in result["hardware"] and result["date"]
    steps, engines = result["parts"]["steps"], result["parts"]["engines"]
    assert "no/such_recipe" in steps["items"]["no/such_recipe"]["error"]
    assert steps["ended"] and engines["ended"] and steps["left_out"] == engines["left_out"] == []
    assert set(engines["items"]) == {"hf against vllm"}


def test_a_part_whose_time_is_over_is_ended_and_says_so(tmp_path):
    result = run(tmp_path / "gpu.json", "--seconds", str(gpu.SPARE + 1), "--parts", "packing")
    part = result["parts"]["packing"]
    assert part["reason"] == "its time was over" and not part["ended"] and part["items"] == {}


def test_a_folder_without_wheels_is_one_message(tmp_path):
    with pytest.raises(SystemExit, match=r"there are no wheels\. Fill it with"):
        gpu.install(tmp_path, str(tmp_path))
