"""Runs that are killed, and runs shared out over processes: real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from owners_files import write_benchmark
from worlds import write_checkpoint, write_world

from vlm_sft_rl.evaluation.runner import evaluate_spec
from vlm_sft_rl.io import read_json
from vlm_sft_rl.runs import collect, read_samples

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
CODE = """
import sys
from vlm_sft_rl.evaluation.runner import evaluate_spec
folder, output, rounds, decoder = sys.argv[1:]
summary = evaluate_spec(folder + "/spec.yaml", folder + "/model", output_dir=output, data_dir=folder + "/data",
                        batch_size=1, max_new_tokens=40, report=False, rounds=int(rounds), decoder=decoder)
print(summary["config"]["rounds"], "rounds")
print("n", summary["n"])
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, count=24)
    write_checkpoint(folder / "model")
    return folder


@pytest.fixture(scope="module")
def expected(world):
    output = world / "single"
    summary = evaluate_spec(
        world / "spec.yaml",
        world / "model",
        output_dir=output,
        data_dir=world / "data",
        max_new_tokens=40,
        report=False,
    )
    return summary["metrics"], [(sample["id"], sample["tagged_answer"]) for sample in read_samples(output)]


def start(world, output, rounds=100, decoder="greedy", **environment):
    return subprocess.Popen(
        [sys.executable, "-c", CODE, str(world), str(output), str(rounds), decoder],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def answers(output):
    return [(sample["id"], sample["tagged_answer"]) for sample in read_samples(output)]


def test_a_killed_run_goes_on_where_it_was(world, expected, tmp_path):
    process = start(world, tmp_path / "out")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (tmp_path / "out/samples.jsonl").is_file():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = collect(tmp_path / "out")
    assert 0 < len(kept) < 24
    done = start(world, tmp_path / "out")
    assert done.wait() == 0, done.stdout.read()
    assert answers(tmp_path / "out") == expected[1]


def test_two_processes_give_what_one_gives(world, expected, tmp_path):
    both = [start(world, tmp_path / "out", RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1)]
    outputs = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert all(text.rstrip().endswith("n 24") for text in outputs), outputs
    assert answers(tmp_path / "out") == expected[1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "run.json",
        "samples.jsonl",
        "summary.json",
    ]


@pytest.mark.parametrize("decoder", ["self-select", "stage-beam"])
def test_two_processes_draw_the_candidates_that_one_draws(world, tmp_path, decoder):
    evaluate_spec(
        world / "spec.yaml",
        world / "model",
        decoder=decoder,
        output_dir=tmp_path / "alone",
        data_dir=world / "data",
        max_new_tokens=40,
        batch_size=7,
        report=False,
    )
    both = [
        start(world, tmp_path / "both", decoder=decoder, RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    alone, shared = read_samples(tmp_path / "alone"), read_samples(tmp_path / "both")
    assert alone == shared and any(len(set(s["trace"][0]["texts"])) > 1 for s in shared)
    summaries = [read_json(tmp_path / name / "summary.json") for name in ("alone", "both")]
    assert summaries[0]["metrics"] == summaries[1]["metrics"]


def test_shards_of_a_killed_two_process_run_are_taken_up_by_one(world, expected, tmp_path):
    both = [start(world, tmp_path / "out", RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1)]
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list((tmp_path / "out").glob("samples.rank*")):
        time.sleep(0.01)
    for process in both:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 0 < len(collect(tmp_path / "out")) < 24
    done = start(world, tmp_path / "out")
    assert done.wait() == 0, done.stdout.read()
    assert answers(tmp_path / "out") == expected[1]


def test_a_later_process_does_not_take_the_summary_of_an_earlier_run(world, tmp_path):
    """The second process comes first, finds every question answered and a summary, and has to wait all the same."""
    done = start(world, tmp_path / "out")
    assert done.wait() == 0, done.stdout.read()
    late = start(world, tmp_path / "out", rounds=37, RANK="1", WORLD_SIZE="2")
    with pytest.raises(subprocess.TimeoutExpired):
        late.wait(timeout=30)
    first = start(world, tmp_path / "out", rounds=37, RANK="0", WORLD_SIZE="2")
    outputs = [process.communicate(timeout=240)[0] for process in (first, late)]
    assert all("37 rounds" in text and "n 24" in text for text in outputs), outputs


PUBLISHED = """
import sys
from vlm_sft_rl.evaluation.runner import evaluate_spec
data, model, output = sys.argv[1:]
print(evaluate_spec("mme_hall", model, output_dir=output, data_dir=data, max_new_tokens=6, rounds=10)["n"])
"""


def test_two_processes_share_a_benchmark_with_its_pictures_inside(world, tmp_path):
    """Both write the pictures of the parquet file, and the two questions on a picture go to different processes."""
    folders = [write_benchmark("mme_hall", tmp_path / name) for name in ("one", "two")]

    def run(data, output, **environment):
        return subprocess.Popen(
            [sys.executable, "-c", PUBLISHED, str(data), str(world / "model"), str(output)],
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    alone = run(folders[0], tmp_path / "alone")
    assert alone.wait(timeout=240) == 0, alone.stdout.read()
    both = [run(folders[1], tmp_path / "both", RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1)]
    outputs = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    summaries = [read_json(tmp_path / name / "summary.json") for name in ("alone", "both")]
    assert summaries[0]["metrics"] == summaries[1]["metrics"] and summaries[1]["units"] == 2
    assert answers(tmp_path / "alone") == answers(tmp_path / "both")
