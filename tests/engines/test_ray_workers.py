"""Answers by workers of a real Ray cluster: those of one process, none lost and none twice, whoever is killed."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from json_lines import read_lines, write_lines
from worlds import evaluate, write_checkpoint, write_world

from vlm_sft_rl.decode import DecodeOptions, decode
from vlm_sft_rl.errors import RowError, UserError
from vlm_sft_rl.evaluation.decoders import EngineOptions
from vlm_sft_rl.evaluation.results import read_samples
from vlm_sft_rl.self_training.sampling import CheckpointSampler, run_sampling, task
from vlm_sft_rl.workers import Workers, workers_of

ray = pytest.importorskip("ray", reason="`make test-engines` makes an environment with Ray")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
COUNT = 96
TWO = Workers(ray="auto", workers=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    write_checkpoint(folder / "model")
    rows = [
        {"id": f"q{i}", "images": [f"images/{i % 6}.png"], "question": f"What is {i}?"} for i in range(COUNT)
    ]
    write_lines(folder / "data/rows.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def run(world, output, workers=None, rows="rows.jsonl"):
    # small calls: a kill hits some of them and not others
    options = DecodeOptions(shard_rows=40, batch_size=1)
    settings = {"max_new_tokens": 30}
    return decode(
        world / "data" / rows,
        output,
        world / "model",
        "sample",
        settings=settings,
        options=options,
        workers=workers,
    )


def answers(output):
    lines = [line for path in sorted(output.glob("shard-?????.jsonl")) for line in read_lines(path)]
    return [(line["row"], line["id"], line["tagged_answer"], line["ok"]) for line in lines]


@pytest.fixture(scope="module")
def expected(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone")
    run(world, output)
    return answers(output)


def wait_for_answers(output, count=8):
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        if sum(len(path.read_bytes().splitlines()) for path in output.glob("shard-*.jsonl")) >= count:
            return
        time.sleep(0.02)
    raise AssertionError("no answers came")


def actors():
    """Processes of this machine that hold a model for a cluster."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "ray::MapWorker" in " ".join(process.info["cmdline"] or ()):
            found.append(process)
    return found


def test_a_killed_worker_costs_no_answer(world, cluster, expected, tmp_path):
    killed = []

    def kill():
        wait_for_answers(tmp_path)
        killed.append(actors()[0])
        killed[0].send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    report = run(world, tmp_path, TWO)
    killer.join()
    assert killed and not killed[0].is_running()
    assert report.answered == COUNT and answers(tmp_path) == expected


DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_ray_workers import Workers, run
if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]), Workers(ray="local", workers=1))
"""


def test_a_killed_driver_goes_on_where_it_was(world, cluster, expected, tmp_path):
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    folders = os.pathsep.join([str(ROOT), str(ROOT / "tests/support")])
    output = tmp_path / "out"
    driver = subprocess.Popen(
        [sys.executable, script, world, output, ROOT / "tests/engines"],
        env=os.environ | {"PYTHONPATH": folders},
    )
    wait_for_answers(output)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = sum(len(path.read_bytes().splitlines()) for path in output.glob("shard-*.jsonl"))
    report = run(world, output, TWO)
    assert 0 < report.answered < COUNT and COUNT - report.answered in (before, before - 1)
    assert answers(output) == expected


def test_an_evaluation_and_self_training_are_answered_by_workers(world, cluster, tmp_path):
    one = Workers(ray="auto", workers=1)
    for output, workers in (("alone", None), ("ray", one)):
        evaluate(
            world / "spec.yaml",
            world / "model",
            tmp_path / output,
            world / "data",
            decoder="sample",
            workers=workers,
        )
    alone, shared = (read_samples(tmp_path / name) for name in ("alone", "ray"))
    assert [s["tagged_answer"] for s in alone] == [s["tagged_answer"] for s in shared]

    tasks = [task(row, row["question"]) for row in read_lines(world / "data/rows.jsonl")[:10]]
    sampling = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "max_new_tokens": 5, "stop": []}
    stores = [
        run_sampling(
            tmp_path / f"store{number}",
            tasks,
            3,
            {"seed": 0},
            CheckpointSampler(world / "model", world / "data", EngineOptions(batch_size=6)),
            sampling=sampling,
            seed=0,
            workers=workers,
        )
        for number, workers in enumerate((None, one))
    ]
    assert stores[0] == stores[1] and len(stores[1]) == 30


def test_an_error_of_a_worker_is_the_message_of_one_process(world, cluster, tmp_path):
    rows = read_lines(world / "data/rows.jsonl")[:6]
    rows[4]["images"] = ["absent.png"]
    write_lines(world / "data/bad.jsonl", rows)
    with pytest.raises(RowError, match=r"bad\.jsonl:5: image 'absent\.png' does not exist"):
        run(world, tmp_path, Workers(ray="auto", workers=1), rows="bad.jsonl")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"workers": 2}, "give --ray"),
        ({"ray": "local", "workers": 0}, "workers = 0"),
        ({"ray": "auto", "workers": 3}, "3 workers without GPUs need 4 cores"),
    ],
)
def test_workers_that_cannot_be_are_refused(world, cluster, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        run(world, tmp_path, workers_of(options))


def test_a_cluster_that_is_not_there_is_named(world, tmp_path):
    code = (
        "from vlm_sft_rl.workers import *\n"
        "try:\n    list(answers_of(None, [1], Workers(ray='127.0.0.1:9')))\n"
        "except Exception as error:\n    print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "UserError --ray 127.0.0.1:9: no cluster can be reached there" in done.stdout, done
