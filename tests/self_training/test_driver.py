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
from json_lines import read_lines, write_lines
from safetensors.torch import load_file

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.io import write_jsonl
from vlm_sft_rl.self_train import self_train
from vlm_sft_rl.self_training.config import VARIANTS
from vlm_sft_rl.self_training.loop import SelfTraining
from vlm_sft_rl.self_training.processes import Trainer
from vlm_sft_rl.self_training.rounds import read_rows
from vlm_sft_rl.self_training.sampling import task

ROOT = Path(__file__).parents[2]


def start(recipe: Path) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "vlm_sft_rl.cli.app",
        "self-train",
        str(recipe),
        "--accelerate-config",
        "cpu",
    ]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def count_files(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


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
    rows = read_lines(run / "round-1" / "rows.jsonl")
    assert {r["messages"][-1]["answer_type"] for r in rows} == {"cot", "refine", "select"}
    assert sum(r["id"].endswith("/warmup") for r in rows) == 8
    page = (run / "report.html").read_text()
    assert "Training loss" in page and "SFT, round 1" in page
    curve = [line.split(",")[:3] for line in (run / "scaling.csv").read_text().splitlines()[1:]]
    assert [line for line in curve if line[2] == "self_select"] == [[r, "3", "self_select"] for r in "01"]
    assert [line[1] for line in curve if line[0] == "1" and line[2] == "majority"] == ["1", "2", "3"]
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
    # how far the run must have come for each kill is told in files it wrote, not in seconds: machines differ
    rng, whole = random.Random(4), count_files(finished / "run")
    for share in (rng.uniform(0, 0.35), rng.uniform(0.35, 0.7)):
        process = start(recipe)
        while process.poll() is None and count_files(tmp_path / "run") < share * whole:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 1))
        assert process.poll() is None, process.stdout.read().decode()
        os.kill(process.pid, signal.SIGKILL)  # the driver alone: its children must notice by themselves
        process.wait()
        time.sleep(rng.uniform(0, 1))
    process = start(recipe)
    assert process.wait() == 0, process.stdout.read().decode()
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
        ({"sample_temperature": 0.0}, r"`sample_temperature` is 0\.0, expected a number > 0"),
        ({"start": "cold"}, "remove `warmup_file`"),
        ({"warmup_file": None}, "nothing to train on"),
        ({"train_questions": None}, "`train_questions` is not set"),
        ({"dpo": {"beta": "much"}, "round_objective": "sft+dpo"}, "`dpo`: .*beta"),
        ({"select_sizes": [1], "start": "cold", "warmup_file": None}, "`select_sizes`"),
        ({"max_solve_rate": 2.0}, "`max_solve_rate`"),
        ({"kind_weights": {"selct": 2.0}}, "`kind_weights`: 'selct'"),
        ({"dpo": {"learning_rat": 1}}, r"unknown key `learning_rat` \(did you mean `learning_rate`"),
        ({"method": "sft"}, "needs a recipe with `method: r3v`"),
        ({"image_root": "nowhere"}, "is not a folder"),
        ({"model_name_or_path": "no/such/model"}, "no/such/model: no such folder"),
        ({"pair_kinds": ["cott"]}, "pair_kinds"),
        ({"pair_weights": {"cott": 1.0}}, "`pair_weights`: 'cott' is not one of cot, refine, select"),
        ({"pair_weights": {"cot": -1}}, r"`pair_weights\.cot` must be a number >= 0, found -1"),
        ({"variant": "star_dpo", "num_rounds": 0}, "`num_rounds` of at least 1"),
        ({"variant": "star_dpo", "round_objective": "dpo"}, "set `round_objective: sft`"),
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
        ('{"id": "x", "question": "x"}', ":9: a question without `answer` or any other truth"),
        ('{"id": "x", "question": "x", "objects": ["cat"]}', ":9: no field `answer`"),
        ('{"id": "x", "question": "x", "answer": "1", "images": ["no.png"]}', ":9: .*does not exist"),
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
        rows = read_lines(tmp_path / f"{split}.jsonl")
        for row in rows:
            if split == "train":
                row["answer"] = answer
            else:
                row["answer"] = row["rationale"] = "1"
        write_lines(tmp_path / f"{split}.jsonl", rows)
    words = ["--sample_temperature", "0.1", "--save_strategy", "no"]
    if answer == "9":
        with pytest.raises(UserError, match=r"no sample could be learned from.*warm-up"):
            self_train(recipe, words, accelerate_config="cpu")
        return
    summary = self_train(recipe, words, accelerate_config="cpu")
    assert summary["pools"][0]["right"] == 1.0
    assert set(summary["rows"][1]) == {"cot"}


class Recorder:
    """In place of the trainer: what would have been trained from where."""

    def __init__(self):
        self.calls, self.processes = [], 1

    def train(self, objective, folder, rows, start, console):
        assert rows.is_file()
        self.calls.append((objective, f"{folder.parent.name}/{folder.name}", start))


def loop_of(folder: Path, name: str, **options) -> SelfTraining:
    """A loop over the questions below `folder`; each has the samples 1, 2, 2 in every round before the last."""
    from vlm_sft_rl.methods.supervised import R3VConfig

    if not (folder / "recipe.yaml").exists():
        loops.write_loop(folder)
    files = {f"{split}_questions": str(folder / f"{split}.jsonl") for split in ("train", "test")}
    config = R3VConfig(
        output_dir=str(folder / name),
        use_cpu=True,
        **{"num_rounds": 3, "warmup_file": str(folder / "warmup.jsonl"), **files, **options},
    )
    run = SelfTraining(config, Recorder(), "BASE", folder / name, str(folder))
    for round_ in range(config.rounds):
        samples = [
            {"id": f"{q['id']}#{k}", "question_id": q["id"], "index": k, "images": q["images"], "prompt": "p"}
            | {"answer": "122"[k % 3]}
            for q in run.train
            for k in range(config.samples_now)
        ]
        write_jsonl(run.folder(round_) / "pool" / "samples.jsonl", samples)
    return run


def test_every_variant_changes_the_mixture_as_it_says(tmp_path):
    """Eight questions, of which half have one right sample of three and half two; eight rationales to warm up."""
    direct, warmup, each = {"direct": 8}, {"cot": 8}, {"cot": 16}
    refine, select = {"refine": 8}, {"select": 8}
    expected = {
        "full": (3, direct | each | refine | select),
        "star": (3, direct | each),
        "star_dpo": (3, direct | each),
        "no_refine": (3, direct | each | select),
        "no_select": (3, direct | each | refine),
        # all nine samples of a question at once: both kinds of selection
        "no_iteration": (1, direct | each | refine | {"select": 16}),
        "distill": (0, direct | warmup),
        "zero_shot": (0, direct | warmup),
    }
    found = {}
    for variant in VARIANTS:
        run = loop_of(tmp_path, variant, variant=variant)
        last = run.config.rounds
        mixture = run.mixture(min(1, last))
        found[variant] = last, dict(mixture.counts)
    assert found == expected
    assert loop_of(tmp_path, "zero_shot", variant="zero_shot").untrained


@pytest.mark.parametrize(
    ("options", "starts"),
    [
        ({}, [("sft", "BASE")]),
        ({"restart_from": "previous"}, [("sft", "round-1/train")]),
        ({"round_objective": "sft+dpo"}, [("sft", "BASE"), ("dpo", "round-2/train")]),
        (
            {"round_objective": "sft+dpo", "restart_from": "previous"},
            [("sft", "round-1/dpo"), ("dpo", "round-2/train")],
        ),
        ({"round_objective": "dpo"}, [("dpo", "round-0/train")]),
        ({"round_objective": "dpo", "restart_from": "previous"}, [("dpo", "round-1/dpo")]),
    ],
)
def test_where_a_round_starts(tmp_path, options, starts):
    run = loop_of(tmp_path, "run", pair_kinds=["cot", "refine"], pair_weights={"refine": 0.5}, **options)
    run.build_and_train(2)
    assert [(o, s.removeprefix(f"{run.output}/")) for o, _, s in run.trainer.calls] == starts
    if "dpo" in run.config.round_objective:
        pairs = read_rows(run.folder(2) / "pairs.jsonl")
        assert {(p["pair_kind"], p["pair_weight"]) for p in pairs} == {("cot", 1.0), ("refine", 0.5)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"variant": "star"}, "uses_refine: True -> False; uses_select: True -> False"),
        ({"rules": "released"}, "rules: 'ours' -> 'released'"),
        ({"balance": True}, "balance: False -> True"),
        ({"prompt_style": "plain"}, "prompt_style: 'guided' -> 'plain'"),
        ("train", "train_questions: "),
        ("processes", "processes: 1 -> 2"),
    ],
)
def test_other_rows_over_an_old_folder_are_refused_before_anything_is_written(tmp_path, change, said):
    run = loop_of(tmp_path, "run")
    run.build_and_train(1)
    before = {path: path.read_bytes() for path in run.output.rglob("*") if path.is_file()}
    if change == "train":
        path = tmp_path / "train.jsonl"
        path.write_text(path.read_text().replace('"answer": "1"', '"answer": "3"', 1))
    other = loop_of(tmp_path, "run", **(change if isinstance(change, dict) else {}))
    other.trainer.processes += change == "processes"
    with pytest.raises(UserError, match=f"round-1: made with other settings.*{said}.*Nothing was changed"):
        other.build_and_train(1)
    assert before == {path: path.read_bytes() for path in run.output.rglob("*") if path.is_file()}


def test_more_rounds_go_on_with_an_old_folder(tmp_path):
    loop_of(tmp_path, "run", num_rounds=2).build_and_train(2)
    run = loop_of(tmp_path, "run", num_rounds=3)
    run.build_and_train(2)
    run.build_and_train(3)
    assert [name for _, name, _ in run.trainer.calls] == ["round-2/train", "round-3/train"]


@pytest.mark.slow
def test_two_processes_fill_the_store_that_one_fills(tmp_path):
    stores = []
    for processes in (1, 2):
        run = loop_of(tmp_path, f"run{processes}", sample_processes=processes, max_new_tokens=4)
        run.trainer, run.base = Trainer({}, "cpu"), str(tmp_path / "base")
        run.config.variant = "zero_shot"  # round 0 is the base itself
        asked = [task(q, run.prompts.ask(q)) for q in run.test]
        stores.append(run.answers(0, "test/samples", asked, 3, run.config.sampling()))
        assert not list(run.folder(0).rglob("*rank*"))
    assert stores[0] == stores[1] and len(stores[0]) == 24
