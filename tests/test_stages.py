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
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.io import read_json
from vlm_sft_rl.runs import Stages, fingerprints


@pytest.fixture
def code(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("one")
    return tmp_path / "code"


@pytest.fixture
def draw(tmp_path, code):
    """Run the stage `draw` in a new process's view of the folder."""

    def run(action=lambda: None, **options):
        job = Stages(tmp_path, Console(file=StringIO(), width=500), **options)
        job.run("draw", action, [code, "io.py"])
        return job

    return run


def interrupt():
    time.sleep(0.3)
    raise KeyboardInterrupt


def test_a_stage_runs_once_and_its_time_is_kept(draw):
    draw(lambda: time.sleep(0.25))
    job = draw(lambda: pytest.fail("ran again"))
    assert 0.2 <= job.seconds["draw"] < 5 and job.stale == []


def test_other_code_makes_a_finished_stage_stale(draw, code):
    draw()
    (code / "a.py").write_text("two")
    with pytest.raises(UserError, match=r'"draw" was made by version .* with another code;.*--keep-stale'):
        draw()
    job = draw(lambda: pytest.fail("ran again"), keep_stale=True)
    assert job.stale == ["draw"] and "Kept as it is" in job.console.file.getvalue()


def test_folders_of_earlier_versions_are_stale(draw, tmp_path):
    (tmp_path / "stages.json").write_text(json.dumps({"draw": 3.5}))
    with pytest.raises(UserError, match="unknown version"):
        draw()
    assert draw(keep_stale=True).seconds == {"draw": 3.5}


def test_a_stage_begun_by_other_code_is_not_gone_on_with(draw, code):
    with pytest.raises(KeyboardInterrupt):
        draw(interrupt)
    (code / "new.py").write_text("")
    with pytest.raises(UserError, match="another code"):
        draw()


def test_interrupted_attempts_add_up(draw):
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            draw(interrupt)
    assert 0.6 <= draw(lambda: time.sleep(0.1)).seconds["draw"] < 10


ENDLESS = """
import sys, time
from rich.console import Console
from vlm_sft_rl import runs
runs.BEAT_SECONDS = 0.1
runs.Stages(sys.argv[1], Console(quiet=True)).run("draw", lambda: time.sleep(600), ["io.py"])
"""


def test_a_killed_attempt_counts(tmp_path):
    def seconds():
        path = tmp_path / "stages.json"
        return read_json(path)["draw"]["seconds"] if path.is_file() else 0

    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", ENDLESS, str(tmp_path)], env=environment)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and seconds() < 0.5:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    spent = seconds()
    assert spent >= 0.5
    Stages(tmp_path, Console(quiet=True)).run("draw", lambda: time.sleep(0.2), ["io.py"])
    assert seconds() >= spent + 0.2


def test_what_the_demo_names_exists():
    parts = {str(part) for part in fingerprints(demo_reverse.MEASURED)}
    assert {"pocket/world.py", "trainers", "decoding", "pocket.yaml", "pocket_captions.yaml"} <= parts
    with pytest.raises(UserError, match=r"nothing\.py"):
        fingerprints(["nothing.py"])
