"""Two processes train as one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import families
import pytest

SCRIPT = Path(__file__).with_name("in_processes.py")
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def launch(folder: Path, processes: int, job: str, number: int) -> list[dict]:
    """What `in_processes.py` writes, process by process."""
    folder.mkdir()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(SCRIPT), job, str(folder)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*command, str(number)], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]
    # one that is left at the interpreter's exit can abort a process whose work is done
    assert all(rank.pop("threads of gloo") == [] for rank in ranks)
    return ranks


def test_two_processes_share_the_packs_and_train_as_one(tmp_path):
    """One process that accumulates two packs, and two processes with one pack each, take the same steps."""
    (alone,) = launch(tmp_path / "one", 1, "packed", 2)
    one, other = launch(tmp_path / "two", 2, "packed", 1)
    packs = [*one["packs"], *other["packs"]]
    assert len(packs) == 4 and all(len({name.split("-")[0] for name in pack}) == 1 for pack in packs)
    assert sorted(name for pack in packs for name in pack) == [f"{p}-{k}" for p in range(4) for k in range(4)]
    assert sorted(packs) == sorted(alone["packs"])
    assert one["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert one["weights"] == other["weights"] == pytest.approx(alone["weights"], rel=1e-6)


def test_self_correction_and_dpo_with_adapters_train_on_two_processes_as_on_one(tmp_path):
    families.save(*families.llava(), tmp_path / "model")
    (alone,) = launch(tmp_path / "one", 1, "methods", 4)
    for rank in launch(tmp_path / "two", 2, "methods", 2):
        for method, figures in (
            ("sco", ("loss", "loss/attempt", "loss/correction")),
            ("dpo", ("loss", "rewards/margins_cot", "rewards/margins_refine")),
        ):
            for figure in figures:
                values = [entry[figure] for entry in alone[method]]
                assert len(values) == 3 and len(set(values)) > 1
                assert [entry[figure] for entry in rank[method]] == pytest.approx(values, abs=1e-5), figure


def test_a_signal_on_one_process_is_one_for_all_and_none_on_any_moves_nothing(tmp_path):
    one, other = launch(tmp_path / "two", 2, "signal", 3)
    assert one["skipped"] == [0, 1, 1]
    assert one["start"] != one["end"] == other["end"]
    assert one["sums"] == other["sums"] == [one["end"]] * 2
