import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("two_processes.py")
ROOT = Path(__file__).parents[2]


def launch(folder: Path, processes: int, argument: int, script: Path = SCRIPT) -> list[dict]:
    folder.mkdir()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else [])]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, str(script), str(folder), str(argument)],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.slow
def test_two_processes_share_the_packs_and_train_as_one(tmp_path):
    """One process that accumulates two packs, and two processes with one pack each, take the same steps."""
    (alone,) = launch(tmp_path / "one", 1, 2)
    two = launch(tmp_path / "two", 2, 1)
    packs = [pack for rank in two for pack in rank["seen"]]
    assert len(packs) == 4 and all(len({name.split("-")[0] for name in pack}) == 1 for pack in packs)
    assert sorted(name for pack in packs for name in pack) == sorted(
        f"{p}-{k}" for p in range(4) for k in range(4)
    )
    assert sorted(packs) == sorted(alone["seen"])
    assert two[0]["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert two[0]["weights"] == two[1]["weights"] == pytest.approx(alone["weights"], rel=1e-5)
