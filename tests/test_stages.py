"""Stages of a demo: done once, by the code that is here, and timed through every interruption."""

import json
import os
import signal
import subprocess
import sys
import time
from io import StringIO

import pytest
from rich.console import Console

from vlm_sft_rl.demos import reverse as demo_reverse
from vlm_sft_rl.demos import sc_tune, sco, tagging
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.runs import Stages, fingerprints


def stages(folder, **options):
    return Stages(folder, Console(file=StringIO(), width=500), **options)


@pytest.fixture
def code(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("one")
    return tmp_path / "code"


def test_a_stage_runs_once_and_its_time_is_kept(tmp_path, code):
    calls = []
    for _ in range(2):
        job = stages(tmp_path)
        job.run("draw", lambda: calls.append(time.sleep(0.25)), [code])
    assert len(calls) == 1 and 0.2 <= job.seconds["draw"] < 5 and job.stale == []


def test_other_code_makes_a_finished_stage_stale(tmp_path, code):
    stages(tmp_path).run("draw", lambda: None, [code, "io.py"])
    (code / "a.py").write_text("two")
    with pytest.raises(
        UserError, match=r'stage "draw" was made by version .* with another code;.*--keep-stale'
    ):
        stages(tmp_path).run("draw", lambda: None, [code, "io.py"])
    job = stages(tmp_path, keep_stale=True)
    job.run("draw", lambda: pytest.fail("ran again"), [code, "io.py"])
    assert job.stale == ["draw"] and "Kept as it is" in job.console.file.getvalue()


def test_folders_of_earlier_versions_are_stale(tmp_path, code):
    (tmp_path / "stages.json").write_text(json.dumps({"draw": 3.5}))
    with pytest.raises(UserError, match="unknown version"):
        stages(tmp_path).run("draw", lambda: None, [code])
    assert stages(tmp_path).seconds == {"draw": 3.5}


def test_a_stage_begun_by_other_code_is_not_gone_on_with(tmp_path, code):
    with pytest.raises(KeyboardInterrupt):
        stages(tmp_path).run("draw", interrupt, [code])
    (code / "new.py").write_text("")
    with pytest.raises(UserError, match="another code"):
        stages(tmp_path).run("draw", lambda: None, [code])


def interrupt():
    time.sleep(0.3)
    raise KeyboardInterrupt


def test_interrupted_attempts_add_up(tmp_path, code):
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            stages(tmp_path).run("draw", interrupt, [code])
    job = stages(tmp_path)
    job.run("draw", lambda: time.sleep(0.1), [code])
    assert 0.6 <= job.seconds["draw"] < 10


ENDLESS = """
import sys, time
from rich.console import Console
from vlm_sft_rl import runs
runs.BEAT_SECONDS = 0.1
runs.Stages(sys.argv[1], Console(quiet=True)).run("draw", lambda: time.sleep(600), ["io.py"])
"""


def test_a_killed_attempt_counts(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and stages(tmp_path).seconds.get("draw", 0) < 0.5:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    spent = stages(tmp_path).seconds["draw"]
    assert spent >= 0.5
    job = stages(tmp_path)
    job.run("draw", lambda: time.sleep(0.2), ["io.py"])
    assert job.seconds["draw"] >= spent + 0.2


@pytest.mark.parametrize(
    "parts", [sc_tune.MEASURED, sco.MEASURED, tagging.TAGGED], ids=["sc_tune", "sco", "tagging"]
)
def test_what_the_demos_name_exists(parts):
    assert {"pocket/world.py", "data", "models", "decoding"} <= fingerprints(parts).keys()


def test_what_the_demo_reverse_names_exists():
    parts = {str(part) for part in fingerprints(demo_reverse.MEASURED)}
    assert {"pocket/world.py", "trainers", "decoding", "pocket.yaml", "pocket_captions.yaml"} <= parts
    with pytest.raises(UserError, match=r"nothing\.py"):
        fingerprints(["nothing.py"])
