import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import loops
import pytest
import torch
from safetensors.torch import load_file

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.recipes import load_recipe
from vlm_sft_rl.self_train import self_train

ROOT = Path(__file__).parents[2]


def start(recipe: Path) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "vlm_sft_rl.cli",
        "self-train",
        str(recipe),
        "--accelerate-config",
        "cpu",
    ]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("loop")
    self_train(loops.write_loop(folder), accelerate_config="cpu")
    return folder


@pytest.mark.slow
def test_all_artefacts_exist(finished):
    run = finished / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert [m["round"] for m in summary["rounds"]] == [0, 1] and summary["n"] == 8
    for metrics in summary["rounds"]:
        for system in ("greedy", "majority", "self_select", "self_refine", "pass_at_k"):
            assert 0 <= metrics[system]["low"] <= metrics[system]["value"] <= metrics[system]["high"] <= 1
    assert summary["pools"]["0"]["samples"] == 24
    # the form is learnt and the answer is a coin toss
    assert 0.2 < summary["pools"]["0"]["right"] < 0.8
    rows = [json.loads(line) for line in (run / "round-1" / "rows.jsonl").read_text().splitlines()]
    assert {r["messages"][-1]["answer_type"] for r in rows} == {"cot", "refine", "select"}
    assert sum(r["id"].endswith("/warmup") for r in rows) == 8
    assert (run / "report.html").stat().st_size > 5000
    assert "2,1" not in (run / "scaling.csv").read_text().splitlines()[0]
    for round_ in (0, 1):
        assert (run / f"round-{round_}" / "train" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_round_starts_from_the_base(finished):
    text = (finished / "run" / "round-1" / "train.yaml").read_text()
    assert f"model_name_or_path: {finished / 'base'}" in text


@pytest.mark.slow
def test_doing_it_again_does_nothing(finished):
    weights = finished / "run" / "round-1" / "train" / "model.safetensors"
    before, outcome = weights.stat().st_mtime_ns, loops.outcome(finished / "run")
    self_train(finished / "recipe.yaml", accelerate_config="cpu")
    assert weights.stat().st_mtime_ns == before
    assert loops.outcome(finished / "run") == outcome


@pytest.mark.slow
def test_a_changed_setting_over_an_old_folder_is_refused_and_nothing_is_lost(finished):
    outcome = loops.outcome(finished / "run")
    for words, changed in (
        (["--learning_rate", "0.5"], "learning_rate: 0.01 -> 0.5"),
        (["--sample_temperature", "0.5"], "temperature: 0.9 -> 0.5"),
    ):
        with pytest.raises(UserError, match=f"{changed}.*Nothing was changed"):
            self_train(finished / "recipe.yaml", words, accelerate_config="cpu")
    assert loops.outcome(finished / "run") == outcome


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_gives_the_same_result(finished, tmp_path):
    recipe = loops.write_loop(tmp_path)
    rng, kills = random.Random(4), 0
    while True:
        process = start(recipe)
        try:
            # the first seconds are imports; what is to be hit comes behind them
            status = process.wait(rng.uniform(9, 30) if kills < 4 else None)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)  # the driver alone: its children must notice by themselves
            process.wait()
            kills += 1
            time.sleep(rng.uniform(0, 1))
            continue
        assert status == 0, process.stdout.read().decode()
        break
    assert kills >= 2
    assert loops.outcome(tmp_path / "run") == loops.outcome(finished / "run")


@pytest.mark.slow
def test_a_failed_training_stops_the_loop_with_the_childs_error(tmp_path):
    recipe = loops.write_loop(tmp_path, max_length=10)
    with pytest.raises(UserError, match=r"(?s)training .*round-0/train failed.*the limit is 10"):
        self_train(recipe, accelerate_config="cpu")
    assert not (tmp_path / "run" / "round-0" / "pool").exists()


@pytest.mark.slow
def test_dpo_behind_sft_starts_from_the_rounds_own_model_merged(finished, tmp_path):
    """A cold start from a model that has learnt the form; SFT with LoRA, merged, then DPO with LoRA on that."""
    base = finished / "run" / "round-0" / "train"
    cold = {"model_name_or_path": str(base), "start": "cold", "warmup_file": None, "use_direct": True}
    lora = {"use_peft": True, "lora_r": 4, "max_steps": 2, "learning_rate": 1e-3}
    recipe = loops.write_loop(tmp_path, round_objective="sft+dpo", **cold, **lora)
    summary = self_train(recipe, accelerate_config="cpu")
    assert len(summary["rounds"]) == 2
    run = tmp_path / "run"
    assert not (run / "round-0" / "train").exists()  # the base itself
    merged = run / "round-1" / "merged-round-1-train" / "model"
    assert f"model_name_or_path: {merged}" in (run / "round-1" / "dpo.yaml").read_text()
    assert (run / "round-1" / "dpo" / "adapter_model.safetensors").is_file()
    assert not (run / "round-1" / "dpo" / "ref").exists()
    before, after = (load_file(folder / "model.safetensors") for folder in (base, merged))
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"variant": "stars"}, "variant"),
        ({"test_samples": 1}, "`test_samples` is 1"),
        ({"sample_temperature": 0.0}, "equal samples teach nothing"),
        ({"start": "cold"}, "remove `warmup_file`"),
        ({"warmup_file": None}, "nothing to train on"),
        ({"train_questions": None}, "`train_questions` is not set"),
        ({"dpo": {"learning_rat": 1}}, r"unknown key `learning_rat` \(did you mean `learning_rate`"),
        ({"method": "sft"}, "needs a recipe with `method: r3v`"),
        ({"image_root": "nowhere"}, "is not a folder"),
        ({"pair_kinds": ["cott"]}, "pair_kinds"),
    ],
)
def test_bad_settings_fail_before_any_work(tmp_path, settings, complaint):
    recipe = loops.write_loop(tmp_path, **settings)
    with pytest.raises(UserError, match=complaint):
        self_train(recipe, accelerate_config="cpu")
    assert not (tmp_path / "run" / "round-0").exists()


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"id": "train0", "question": "x", "answer": "1"}', "already that of row 1"),
        ('{"id": "x", "question": "x"}', "row 9: `answer`"),
        ('{"id": "a/b", "question": "x", "answer": "1"}', "neither `#` nor `/`"),
        ('{"id": "x", "question": "x", "answer": "1", "images": ["no.png"]}', "row 9.*does not exist"),
        (
            '{"id": "x", "question": "How many?", "answer": "1", "images": ["images/test0.png"]}',
            "training questions too",
        ),
    ],
)
def test_bad_question_files(tmp_path, line, complaint):
    recipe = loops.write_loop(tmp_path)
    with open(tmp_path / "train.jsonl", "a") as handle:
        handle.write(line + "\n")
    with pytest.raises(UserError, match=complaint):
        self_train(recipe, accelerate_config="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("answer", ["9", "1"])
def test_all_wrong_and_all_right_pools(tmp_path, answer):
    """With nothing right there is nothing to learn; with all right there are rationales, but nothing to reflect on."""
    recipe = loops.write_loop(tmp_path)
    for split in ("warmup", "train"):
        rows = [json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        for row in rows:
            if split == "train":
                row["answer"] = answer
            else:
                row["answer"] = row["rationale"] = "1"
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--sample_temperature", "0.1"]
    if answer == "9":
        with pytest.raises(UserError, match=r"no sample could be learned from.*warm-up"):
            self_train(recipe, words, accelerate_config="cpu")
        return
    summary = self_train(recipe, words, accelerate_config="cpu")
    assert summary["pools"][0]["right"] == 1.0
    assert set(summary["rows"][1]) == {"cot"}


def test_every_variant_changes_the_mixture_as_it_says(tmp_path):
    """Switches, without training: the rows that round 1 would be made of, and how many samples are drawn."""
    from vlm_sft_rl.methods.r3v import R3VConfig

    assert load_recipe(loops.write_loop(tmp_path))["method"] == "r3v"
    options = {"output_dir": str(tmp_path / "o"), "use_cpu": True, "num_rounds": 3, "samples_per_question": 3}
    found = {}
    for variant in (
        "full",
        "star",
        "star_dpo",
        "no_refine",
        "no_select",
        "no_iteration",
        "distill",
        "zero_shot",
    ):
        config = R3VConfig(variant=variant, **options)
        found[variant] = (config.uses_refine, config.uses_select, config.rounds, config.samples_now)
    assert found == {
        "full": (True, True, 3, 3),
        "star": (False, False, 3, 3),
        "star_dpo": (False, False, 3, 3),
        "no_refine": (False, True, 3, 3),
        "no_select": (True, False, 3, 3),
        "no_iteration": (True, True, 1, 9),
        "distill": (True, True, 0, 3),
        "zero_shot": (True, True, 0, 3),
    }
