"""`vlm-sft-rl decode --ray` under kills: what two workers answer, against one process, on scenes of the pocket world.

    python eval/speed/workers.py MODEL FOLDER [--rows N] [--workers N] [--alone K/N] [--json FILE]

A worker is killed after a quarter of the rows, the command itself after a half; it is started again and ends. Every row must
then have one answer, and those that one process makes of the part `--alone` must be the same, or the benchmark stops.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from vlm_sft_rl.io import read_jsonl, write_json
from vlm_sft_rl.pocket.dataset import build_world

SHARD_ROWS = 1000


def command(model: Path, rows: Path, output: Path, *more: str) -> list[str]:
    words = [sys.executable, "-m", "vlm_sft_rl.cli", "decode", str(rows), str(output), "--model", str(model)]
    return [*words, "--shard-rows", str(SHARD_ROWS), "--batch-size", "32", *more]


def written(output: Path) -> int:
    """Answers on the disk so far."""
    return sum(path.read_bytes().count(b"\n") for path in output.glob("shard-*.jsonl"))


def wait_until(driver: subprocess.Popen, output: Path, count: int) -> None:
    while written(output) < count:
        if driver.poll() is not None:
            raise AssertionError(
                f"the command ended with {driver.returncode} before {count} answers were there"
            )
        time.sleep(0.2)


def by_workers(words: list[str], output: Path, rows: int) -> dict:
    """Answer all rows, with both kills. Returns seconds and how many answers there were at each kill."""
    started = time.perf_counter()
    driver = subprocess.Popen(words)
    wait_until(driver, output, rows // 4)
    family = psutil.Process(driver.pid).children(recursive=True)
    holders = [process for process in family if "MapWorker" in " ".join(process.cmdline())]
    holders[0].send_signal(signal.SIGKILL)
    at_first = written(output)
    wait_until(driver, output, rows // 2)
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    at_second, stopped = written(output), time.perf_counter()
    psutil.wait_procs(family, timeout=120)  # the cluster ends by itself
    again = time.perf_counter()
    subprocess.run(words, check=True)
    ended = time.perf_counter()
    return {
        "holders": len(holders),
        "answers_at_the_kill_of_a_worker": at_first,
        "answers_at_the_kill_of_the_command": at_second,
        "seconds_until_then": round(stopped - started, 1),
        "seconds_of_the_second_call": round(ended - again, 1),
    }


def lines_of(output: Path) -> list[dict]:
    return [line for path in sorted(output.glob("shard-?????.jsonl")) for _, line in read_jsonl(path)]


def same(one: dict, other: dict) -> bool:
    """Whether two lines are equal but for the last digits of their probabilities."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= 1e-4
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def run(model: Path, folder: Path, rows: int, workers: int, alone: str) -> dict:
    """Returns figures of both runs, and how many rows were compared."""
    # the scenes for training are not needed, and are drawn as few as can be
    world = build_world(folder / "world", sizes={"train": 8, "val": 8, "test": rows})
    questions = world / "test_captions.jsonl"
    many, one = folder / "many", folder / "one"
    figures = by_workers(
        command(model, questions, many, "--ray", "local", "--workers", str(workers)), many, rows
    )
    answers = lines_of(many)
    if [line["row"] for line in answers] != list(range(rows)) or len(
        {line["id"] for line in answers}
    ) != rows:
        raise AssertionError("a row has no answer, or several")
    started = time.perf_counter()
    subprocess.run(command(model, questions, one, "--part", alone), check=True)
    seconds = time.perf_counter() - started
    expected = lines_of(one)
    # a probability that differs in its last digit may cost a draw more, which only the counts then show
    different = [
        line["id"]
        for line in expected
        if not same(line | {"counts": {}}, answers[line["row"]] | {"counts": {}})
    ]
    if different:
        raise AssertionError(
            f"{len(different)} answers differ from those of one process, the first is {different[0]}"
        )
    return {
        "rows": rows,
        "workers": workers,
        **figures,
        "rows_compared": len(expected),
        "rows_of_other_counts": sum(line["counts"] != answers[line["row"]]["counts"] for line in expected),
        "rows_equal_to_the_last_digit": sum(line == answers[line["row"]] for line in expected),
        "seconds_of_one_process": round(seconds, 1),
        "flagged": sum(not line["ok"] for line in answers),
        "bytes_an_answer": round(sum(path.stat().st_size for path in many.glob("*.jsonl")) / rows),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", type=Path, help="a REVERSE model of the pocket world, as `make demo` writes it"
    )
    parser.add_argument("folder", type=Path, help="empty; scenes and answers stay there")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--alone", default="0/1", help="what one process answers, too: every Nth shard from K on"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = run(options.model, options.folder, options.rows, options.workers, options.alone)
    print(json.dumps(report, indent=2))
    if options.json:
        write_json(options.json, report)
