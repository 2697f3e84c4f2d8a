"""The loop on rewinds, in miniature on the shipped pocket verifier: real answers, pairs and trainings, in this process."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from json_lines import read_lines, write_lines
from rich.console import Console

from vlm_sft_rl import train
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.io import write_json, write_text
from vlm_sft_rl.pocket.dataset import build_world
from vlm_sft_rl.recipes import find, load_recipe
from vlm_sft_rl.runs import PACKAGE
from vlm_sft_rl.self_train import self_train
from vlm_sft_rl.self_training import rewinds
from vlm_sft_rl.self_training.config import RewindLoopConfig
from vlm_sft_rl.self_training.processes import Trainer
from vlm_sft_rl.self_training.rewinds import Rewinds

BASE = PACKAGE / "pocket" / "verifier"
SETTINGS = {
    "method": "rewind",
    "model_name_or_path": str(BASE),
    "dtype": "float32",
    "test_spec": "pocket_captions",
    "test_limit": 6,
    "num_rounds": 1,
    "round_objective": "sft+dpo",
    "sample_batch_size": 16,
    "bootstrap_rounds": 20,
    "seed": 0,
    "use_cpu": True,
    "per_device_train_batch_size": 4,
    "gradient_checkpointing": False,
    "max_steps": 3,
    "save_steps": 1,
    "save_total_limit": 1,
    "learning_rate": 1e-4,
    "dpo": {"max_steps": 2, "phrases_only": True, "verdict_weight": 1.0},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world, and beside its captions eight of its pictures without labels."""
    folder = build_world(tmp_path_factory.mktemp("world"), seed=5, sizes={"train": 2, "val": 8, "test": 6})
    rows = read_lines(folder / "val_captions.jsonl")
    asked = [{name: row[name] for name in ("id", "images", "question")} for row in rows]
    write_lines(folder / "pictures.jsonl", asked)
    return folder


def write_recipe(folder: Path, world: Path, **settings) -> Path:
    """A recipe in `folder`, whose run lies there too."""
    recipe = {
        **SETTINGS,
        "pictures": str(world / "pictures.jsonl"),
        "image_root": str(world),
        "test_data_dir": str(world),
        "output_dir": str(folder / "run"),
        **settings,
    }
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in recipe.items() if v is not None}))
    return path


def train_here(self, path, recipe, folder, console):
    """In place of `Trainer._launch`: a start of Python costs more than these trainings do."""
    write_text(path, yaml.safe_dump(recipe))
    assert train.main(["--config", str(path)]) == 0


def run(recipe: Path, *words: str) -> dict:
    return self_train(recipe, words, accelerate_config="cpu", console=Console(quiet=True))


def outcome(folder: Path) -> dict:
    """What two runs must agree on: answers, rows, weights and figures, without times and places."""
    kept = [*folder.glob("round-*/**/*.jsonl"), *folder.glob("round-*/*/model.safetensors")]
    files = {str(path.relative_to(folder)): path.read_bytes() for path in kept if "_index" not in str(path)}
    summary = json.loads((folder / "summary.json").read_text())
    return files | {name: summary[name] for name in ("rounds", "rows", "warnings", "n")}


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_launch", train_here)
        run(write_recipe(folder, world))
    return folder / "run"


def test_the_shipped_recipe_is_what_the_guide_measures():
    recipe = load_recipe(find("recipes", "rewind/pocket_rounds"))
    assert (recipe["round_objective"], recipe["num_rounds"]) == (RewindLoopConfig().round_objective, 3)
    assert recipe["round_objective"] == "sft"


def test_a_round_learns_and_is_measured(whole):
    summary = json.loads((whole / "summary.json").read_text())
    start, last = summary["rounds"]
    assert start["chair_i"]["low"] <= start["chair_i"]["value"] <= start["chair_i"]["high"]
    assert start["verifier_auc_at_start"] == start["verifier_auc"]
    assert last["verifier_auc_at_start"]["value"] > 0.9 and "minus_start" in last
    samples = read_lines(whole / "round-0" / "test" / "greedy" / "samples.jsonl")
    doubted = sum(span["p_unconfident"] > 0.1 for sample in samples for span in sample["spans"])
    graded = start["verifier"]["phrases"], start["verifier"]["wrong_phrases"]
    shares = start["doubted_at_start"]
    assert shares["wrong"] * graded[1] + shares["right"] * (graded[0] - graded[1]) == pytest.approx(doubted)
    rows = summary["rows"]["1"]
    assert rows["answers"] == 8 and rows["pairs"] > 2
    assert len(read_lines(whole / "round-1" / "rows" / "finished.jsonl")) == rows["finished answers"]
    # DPO starts from, and is held by, the model after SFT
    dpo = yaml.safe_load((whole / "round-1" / "dpo.yaml").read_text())
    assert dpo["model_name_or_path"] == str(whole / "round-1" / "train") and dpo["max_steps"] == 2
    page = (whole / "report.html").read_text()
    assert "DPO, round 1" in page and "SFT, round 1" in page and "coverage" in page


def test_a_run_that_dies_between_its_files_ends_as_one_that_nobody_disturbed(
    world, whole, tmp_path, monkeypatch
):
    replace, left = os.replace, 0

    def dying(source, target):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return replace(source, target)

    monkeypatch.setattr(Trainer, "_launch", train_here)
    monkeypatch.setattr(os, "replace", dying)
    recipe, deaths = write_recipe(tmp_path, world), 0
    while True:
        left = 17
        try:
            run(recipe)
            break
        except KeyboardInterrupt:
            deaths += 1
    assert deaths >= 3
    assert outcome(tmp_path / "run") == outcome(whole)


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_trains_ends_as_one_that_nobody_disturbed(world, whole, tmp_path):
    recipe = write_recipe(tmp_path, world)
    command = [
        sys.executable,
        "-m",
        "vlm_sft_rl.cli",
        "self-train",
        str(recipe),
        "--accelerate-config",
        "cpu",
    ]

    def start() -> subprocess.Popen:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    process = start()
    while process.poll() is None and not list((tmp_path / "run" / "round-1" / "train").glob("checkpoint-*")):
        time.sleep(0.05)
    assert process.poll() is None, process.stdout.read()
    process.kill()  # the driver alone: its child must notice by itself
    process.wait()
    process = start()
    text = process.communicate()[0]
    assert process.returncode == 0, text
    assert "round 1" in text and "retrospective" in text
    assert outcome(tmp_path / "run") == outcome(whole)


def loop_of(folder: Path, world: Path, **settings) -> Rewinds:
    """A loop whose trainings are noted and not done."""
    from vlm_sft_rl.train import parse, read_recipe

    path = write_recipe(folder, world, **settings)
    *_, args = parse(read_recipe(path), [], str(path))
    loop = Rewinds(args, Recorder(), str(BASE), args.output_dir, str(world), seed=args.seed)
    loop.console = Console(quiet=True)
    return loop


class Recorder:
    processes = 1

    def __init__(self):
        self.calls = []

    def train(self, objective, folder, rows, start, console):
        self.calls.append((objective, rows.name, "/".join(Path(start).parts[-2:])))


BASE_NAME = "pocket/verifier"


@pytest.mark.parametrize(
    ("settings", "calls"),
    [
        ({"round_objective": "sft"}, [("sft", "finished.jsonl", "round-1/train")]),
        ({"round_objective": "dpo"}, [("dpo", "pairs.jsonl", "round-1/dpo")]),
        ({"round_objective": "dpo", "restart_from": "base"}, [("dpo", "pairs.jsonl", BASE_NAME)]),
        (
            {"restart_from": "base"},
            [("sft", "finished.jsonl", BASE_NAME), ("dpo", "pairs.jsonl", "round-2/train")],
        ),
        ({}, [("sft", "finished.jsonl", "round-1/dpo"), ("dpo", "pairs.jsonl", "round-2/train")]),
    ],
)
def test_what_a_round_trains_on_and_from(world, tmp_path, settings, calls):
    loop = loop_of(tmp_path, world, **settings)
    loop.train(2, tmp_path / "rows")
    assert loop.trainer.calls == calls


@pytest.mark.slow
def test_processes_of_their_own_answer_measure_and_read_as_this_one(world, tmp_path):
    here, others = (loop_of(tmp_path, world, sample_processes=n, round_objective="dpo") for n in (1, 2))
    for loop in (here, others):
        loop.trainer, loop.model = Trainer({}, "cpu"), lambda round_: str(BASE)
    start, same = here.measure(0), others.measure(1)
    for name in ("chair_i", "coverage", "verifier_auc", "verifier_auc_at_start"):
        assert same[name] == start[name], name
    assert same["retrospective"]["metrics"] == start["retrospective"]["metrics"]
    others.rows(1)
    counts = json.loads((others.folder(1) / "rows" / "counts.json").read_text())
    assert counts["answers"] == 8 and counts["pairs"] > 2
    assert len(list((others.folder(1) / "answers").glob("shard-*.jsonl"))) == 2  # one a process


def write_answers(job, workers, console):
    """In place of decoding: the rows that were asked, each answered by a phrase that nothing was taken back for."""
    end = {"text": "a cat", "p_unconfident": 0.01, "tokens": 3, "kind": "accept"}
    lines = [
        {"id": row["id"], "images": row["images"], "prompt": row["question"], "answer": "a cat", "ok": ok}
        | {
            "tagged_answer": "<SPAN> a cat </CN>",
            "trace": [end],
            "spans": [{"text": "a cat", "p_unconfident": 0.1}],
        }
        for ok, row in zip(
            job["settings"].get("oks", [True] * 8), read_lines(Path(job["rows"])), strict=False
        )
    ]
    write_json(Path(job["folder"]) / "run.json", {"shard_rows": 8, "row_count": len(lines)})
    write_lines(Path(job["folder"]) / "shard-00000.jsonl", lines)


def test_each_round_takes_the_next_pictures(world, tmp_path, monkeypatch):
    monkeypatch.setitem(rewinds.JOBS, "answer", write_answers)
    loop = loop_of(tmp_path, world, round_objective="sft", num_rounds=2, pictures_per_round=3)
    loop.model = lambda round_: str(BASE)
    names = [row["id"] for row in read_lines(world / "pictures.jsonl")]
    for round_, expected in ((1, names[:3]), (2, names[3:6])):
        finished = read_lines(loop.rows(round_) / "finished.jsonl")
        assert [row["id"] for row in finished] == expected


def test_a_round_without_rows_says_what_to_do(world, tmp_path, monkeypatch):
    monkeypatch.setitem(rewinds.JOBS, "answer", write_answers)
    with pytest.raises(UserError, match=r"(?s)round 1: .*no pair in it.*a lower `threshold`"):
        loop_of(tmp_path, world, output_dir=str(tmp_path / "a")).rows(1)
    loop = loop_of(tmp_path, world, output_dir=str(tmp_path / "b"), round_objective="sft")
    loop.settings["oks"] = [False] * 8
    with pytest.raises(UserError, match=r"round 1: none of 8 answers was verified.*a higher `threshold`"):
        loop.rows(1)
    loop = loop_of(tmp_path, world, output_dir=str(tmp_path / "c"))
    loop.settings["oks"] = [False] * 8
    with pytest.raises(UserError, match=r"round 1: .*no pair in it.*doubt less.*`num_rounds: 0`"):
        loop.rows(1)


@pytest.mark.parametrize(("engine", "name"), [("zero3", "ZeRO-3"), ("fsdp2", "FSDP")])
def test_weights_in_shards_are_refused_before_a_picture_is_answered(world, tmp_path, engine, name):
    recipe = write_recipe(tmp_path, world)
    with pytest.raises(UserError, match=f"accelerate-config {engine}: .*`doubts`.* under {name}. Take zero2"):
        self_train(recipe, ["--round_objective", "sft"], accelerate_config=engine)
    assert not (tmp_path / "run").exists()


def test_a_fallen_verifier_is_said(world, tmp_path):
    loop = loop_of(tmp_path, world)
    rounds = [
        {"round": k, "n": 6, "verifier_auc_at_start": {"value": area}, "minus_start": {"retrospective": {}}}
        for k, area in enumerate((0.99, 0.975, 0.96))
    ]
    (warning,) = loop.warnings(rounds)
    assert warning.startswith(
        "round 2: the verifier's area at the start's phrases has fallen from 0.990 to 0.960"
    )
    (warning,) = loop.warnings([{"round": 0, "n": 6, "verifier_auc_at_start": None}])
    assert "is not measured" in warning


def test_resampled_answers_that_are_worse_are_said(world, tmp_path):
    loop = loop_of(tmp_path, world)
    area = {"n": 6, "verifier_auc_at_start": {"value": 0.99}}

    def after(round_: int, **gaps: tuple[float, float, float]) -> dict:
        intervals = {
            name: dict(zip(("value", "low", "high"), gap, strict=True)) for name, gap in gaps.items()
        }
        return {"round": round_, **area, "minus_start": {"retrospective": intervals}}

    better = after(1, chair_i=(-0.02, -0.03, -0.01), coverage=(0.1, 0.05, 0.2), length=(-2, -3, -1))
    unclear = after(2, chair_i=(0.01, -0.01, 0.03), coverage=(-0.1, -0.2, 0.1))
    worse = after(3, chair_i=(0.02, 0.01, 0.03), coverage=(-0.1, -0.2, -0.05), repeats=(0.1, 0.0, 0.2))
    (warning,) = loop.warnings([{"round": 0, **area}, better, unclear, worse])
    assert warning.startswith(
        "round 3: resampled answers are worse than the start's: chair_i +0.020 [+0.010, +0.030], "
        "coverage -0.100 [-0.200, -0.050]. "
    )


def test_a_changed_setting_over_an_old_folder_is_refused(world, tmp_path, monkeypatch):
    monkeypatch.setitem(rewinds.JOBS, "answer", write_answers)
    loop_of(tmp_path, world, round_objective="sft").rows(1)
    for settings, change in (
        ({"decoding": {"threshold": 0.3}}, "decoding.threshold: 0.1 -> 0.3"),
        ({"pairs": {"places": "first"}}, "pairs.places: None -> 'first'"),
        ({"seed": 1}, "seed"),
    ):
        loop = loop_of(tmp_path, world, round_objective="sft", **settings)
        with pytest.raises(UserError, match=f"made with other settings.*{re.escape(change)}"):
            loop.rows(1)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"pictures": None}, "`pictures` is not set"),
        ({"pictures": "no/such.jsonl"}, "no/such.jsonl"),
        ({"test_spec": None}, "`test_spec` is not set"),
        ({"test_spec": "pocket_caption"}, "no such eval spec"),
        ({"test_data_dir": "nowhere"}, "nowhere"),
        ({"round_objective": "ppo"}, "`round_objective`"),
        ({"num_rounds": -1}, "`num_rounds` is -1"),
        ({"verifier_fall": -0.1}, "`verifier_fall` is -0.1"),
        ({"pictures_per_round": 9}, "1 rounds of 9 take 9 rows, and .* has 8"),
        ({"pairs": {"place": "first"}}, "`pairs`: there is no 'place'"),
        ({"pairs": {"judge": "truth"}}, "the verifier alone can judge"),
        ({"decoding": {"tau": 0.1}}, "'tau'"),
        ({"decoding": {"threshold": 2.0}}, "threshold = 2.0"),
        ({"samples_per_question": 3}, "unknown key `samples_per_question`"),
        ({"dpo": {"bet": 1}}, "unknown key `bet`"),
        ({"model_name_or_path": str(PACKAGE / "pocket" / "base")}, "lacks the verification tokens"),
        ({"model_name_or_path": "no/such/model"}, "no/such/model: no such folder"),
    ],
)
def test_bad_settings_of_rounds_fail_before_any_work(world, tmp_path, settings, complaint):
    with pytest.raises(UserError, match=complaint):
        run(write_recipe(tmp_path, world, **settings))
    assert not (tmp_path / "run" / "round-0").exists()


def test_a_picture_of_the_test_is_none_to_learn_from(world, tmp_path):
    (row, *_) = read_lines(world / "test_captions.jsonl")
    rows = read_lines(world / "pictures.jsonl")
    pictures = write_lines(
        tmp_path / "pictures.jsonl", [*rows, {**rows[0], "id": "x", "images": row["images"]}]
    )
    with pytest.raises(UserError, match="is a picture of the test too"):
        run(write_recipe(tmp_path, world, pictures=str(pictures)))
