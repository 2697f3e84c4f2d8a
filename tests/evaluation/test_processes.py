"""Runs that are killed, and runs shared out over processes: real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from owners_files import write_benchmark
from worlds import evaluate, write_checkpoint, write_world

from vlm_sft_rl.evaluation.results import read_samples
from vlm_sft_rl.io import read_json
from vlm_sft_rl.runs import collect

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
CODE = """
import sys
from worlds import evaluate
folder, output, rounds, decoder = sys.argv[1:]
summary = evaluate(folder + "/spec.yaml", folder + "/model", output, folder + "/data",
                   batch_size=1, max_new_tokens=40, rounds=int(rounds), decoder=decoder)
print(summary["config"]["rounds"], "rounds")
print("n", summary["n"])
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, count=24)
    write_checkpoint(folder / "model")
    return folder


def answers(output):
    return [(sample["id"], sample["tagged_answer"]) for sample in read_samples(output)]


@pytest.fixture(scope="module")
def expected(world):
    output = world / "single"
    evaluate(world / "spec.yaml", world / "model", output, world / "data", max_new_tokens=40)
    return answers(output)


def python(code, *arguments, **environment):
    folders = os.pathsep.join([str(ROOT), str(ROOT / "tests/support")])
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": folders, "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start(world, output, rounds=100, decoder="greedy", **environment):
    return python(CODE, world, output, rounds, decoder, **environment)


def finish(*processes):
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert not any(process.returncode for process in processes), outputs
    return outputs


def kill_when_something_is_answered(output, *processes):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not collect(output):
        time.sleep(0.01)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_a_killed_run_goes_on_where_it_was(world, expected, tmp_path):
    kill_when_something_is_answered(tmp_path / "out", start(world, tmp_path / "out"))
    assert 0 < len(collect(tmp_path / "out")) < 24
    finish(start(world, tmp_path / "out"))
    assert answers(tmp_path / "out") == expected


def test_two_processes_give_what_one_gives(world, expected, tmp_path):
    both = [start(world, tmp_path / "out", RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1)]
    outputs = finish(*both)
    assert all(text.rstrip().endswith("n 24") for text in outputs), outputs
    assert answers(tmp_path / "out") == expected
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "run.json",
        "samples.jsonl",
        "summary.json",
    ]


@pytest.mark.parametrize("decoder", ["self-select", "stage-beam"])
def test_two_processes_draw_the_candidates_that_one_draws(world, tmp_path, decoder):
    options = {"decoder": decoder, "max_new_tokens": 40, "batch_size": 7}
    evaluate(world / "spec.yaml", world / "model", tmp_path / "alone", world / "data", **options)
    both = tmp_path / "both"
    finish(*(start(world, both, decoder=decoder, RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1)))
    alone, shared = read_samples(tmp_path / "alone"), read_samples(tmp_path / "both")
    assert alone == shared and any(len(set(s["trace"][0]["texts"])) > 1 for s in shared)
    summaries = [read_json(tmp_path / name / "summary.json") for name in ("alone", "both")]
    assert summaries[0]["metrics"] == summaries[1]["metrics"]


def test_shards_of_a_killed_two_process_run_are_taken_up_by_one(world, expected, tmp_path):
    both = [start(world, tmp_path / "out", RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1)]
    kill_when_something_is_answered(tmp_path / "out", *both)
    assert 0 < len(collect(tmp_path / "out")) < 24
    finish(start(world, tmp_path / "out"))
    assert answers(tmp_path / "out") == expected


def test_a_later_process_does_not_take_the_summary_of_an_earlier_run(world, tmp_path):
    """The second process comes first, finds every question answered and a summary, and has to wait all the same."""
    finish(start(world, tmp_path / "out"))
    late = start(world, tmp_path / "out", rounds=37, RANK="1", WORLD_SIZE="2")
    with pytest.raises(subprocess.TimeoutExpired):
        late.wait(timeout=30)
    first = start(world, tmp_path / "out", rounds=37, RANK="0", WORLD_SIZE="2")
    outputs = finish(first, late)
    assert all("37 rounds" in text and "n 24" in text for text in outputs), outputs


PUBLISHED = """
import sys
from worlds import evaluate
data, model, output = sys.argv[1:]
evaluate("mme_hall", model, output, data, max_new_tokens=6, rounds=10)
"""


def test_two_processes_share_a_benchmark_with_its_pictures_inside(world, tmp_path):
    """Both write the pictures of the parquet file, and the two questions on a picture go to different processes."""
    folders = [write_benchmark("mme_hall", tmp_path / name) for name in ("one", "two")]

    finish(python(PUBLISHED, folders[0], world / "model", tmp_path / "alone"))
    both = (PUBLISHED, folders[1], world / "model", tmp_path / "both")
    finish(*(python(*both, RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1)))
    summaries = [read_json(tmp_path / name / "summary.json") for name in ("alone", "both")]
    assert summaries[0]["metrics"] == summaries[1]["metrics"] and summaries[1]["units"] == 2
    assert answers(tmp_path / "alone") == answers(tmp_path / "both")
