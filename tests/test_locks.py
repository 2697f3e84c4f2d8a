"""One process at a time in an output folder, whatever ends it."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from vlm_sft_rl.data.convert import convert
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.io import new_folder, require_absent, write_text
from vlm_sft_rl.locks import LOCK_FILE, Lock, sole_use
from vlm_sft_rl.runs import claim
from vlm_sft_rl.train import main

HOLD = """
import os, sys, time
from vlm_sft_rl.locks import Lock
lock = Lock(sys.argv[1], is_file=sys.argv[2] == "file")
if sys.argv[3] == "forked" and os.fork() == 0:
    time.sleep(600)
print("held", flush=True)
time.sleep(600)
"""


@contextmanager
def held(path, kind="folder", forked=False):
    """Another process that has the lock; killed at the end."""
    words = [sys.executable, "-c", HOLD, str(path), kind, "forked" if forked else "alone"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_second_is_refused_and_told_who_is_there(tmp_path):
    with (
        held(tmp_path / "out") as process,
        pytest.raises(UserError, match=rf"out: process {process.pid} on .* \(-c "),
    ):
        Lock(tmp_path / "out")
    Lock(tmp_path / "out").release()
    assert not (tmp_path / "out" / LOCK_FILE).exists()


def test_a_killed_process_holds_nothing_even_if_a_fork_of_it_lives(tmp_path):
    with held(tmp_path / "out", forked=True) as process:
        process.kill()
        process.wait()
        began = time.monotonic()
        with sole_use(tmp_path / "out"):
            assert time.monotonic() - began < 1


def test_lock_files_of_killed_processes_go_with_the_next_that_is_written(tmp_path, caplog):
    with held(tmp_path / "model", "file"):
        pass  # killed
    ours = tmp_path / ".model.lock"
    far = tmp_path / ".far.lock"
    far.write_text(json.dumps({"pid": 1, "host": "elsewhere", "command": "vlm-sft-rl model prepare"}))
    for name, text in ((".tool.lock", ""), (".other.lock", "[1]"), (".words.lock", "x")):
        (tmp_path / name).write_text(text)
    assert ours.exists()
    with held(tmp_path / "busy", "file"):
        write_text(tmp_path / "rows.txt", "x")
        assert (tmp_path / ".busy.lock").exists() and not ours.exists()
    assert {".far.lock", ".tool.lock", ".other.lock", ".words.lock"} <= {p.name for p in tmp_path.iterdir()}
    with sole_use(tmp_path / "far", is_file=True):
        pass
    assert "process 1 on elsewhere (vlm-sft-rl model prepare) wrote there" in caplog.text and not far.exists()


def test_one_process_shares_what_it_holds_and_ranks_share_the_first(tmp_path, monkeypatch):
    with sole_use(tmp_path / "out"):
        with sole_use(tmp_path / "out"):
            pass
        assert (tmp_path / "out" / LOCK_FILE).exists()
    with held(tmp_path / "out"):
        monkeypatch.setenv("RANK", "1")
        with sole_use(tmp_path / "out"):
            pass
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(UserError, match="is writing there"):
            Lock(tmp_path / "out")


def test_never_two_at_once(tmp_path):
    """Processes that take turns as fast as they can never meet."""
    code = """
import sys, time
from pathlib import Path
from vlm_sft_rl import locks
locks._POLL_SECONDS, locks.GRACE_SECONDS = 0.001, 60
folder = Path(sys.argv[1])
for turn in range(40):
    with locks.sole_use(folder):
        (folder / "inside").touch(exist_ok=False)
        count = int((folder / "count").read_text()) if (folder / "count").exists() else 0
        (folder / "count").write_text(str(count + 1))
        (folder / "inside").unlink()
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "120"


@pytest.mark.parametrize("place", ["file/out", "file"])
def test_what_cannot_be_written_is_said_before_anything_is_loaded(tmp_path, place):
    (tmp_path / "file").write_text("")
    for make in (Lock, require_absent) if place != "file" else (Lock,):
        with pytest.raises(UserError, match="cannot be written to"):
            make(tmp_path / place)


def test_every_writer_asks(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: sft\nmodel_name_or_path: absent\ntrain_file: absent.jsonl\nuse_cpu: true\n")
    with held(tmp_path / "out"):
        assert main(["--config", str(recipe), "--output_dir", str(tmp_path / "out")]) == 2
        assert "is writing there" in capsys.readouterr().err
        with pytest.raises(UserError, match="is writing there"):
            claim(tmp_path / "out", {})
    (tmp_path / "rows.json").write_text("[]")
    with held(tmp_path / "rows.jsonl", "file"), pytest.raises(UserError, match="is writing there"):
        convert(tmp_path / "rows.json", tmp_path / "rows.jsonl")
    with (
        held(tmp_path / "model", "file"),
        pytest.raises(UserError, match="is writing there"),
        new_folder(tmp_path / "model"),
    ):
        pass


def test_a_secret_of_the_command_line_is_not_in_the_lock(tmp_path, monkeypatch):
    words = ["vlm-sft-rl", "train", "r", "--hub_token", "hf_s3cret", "--api-key=s3cret", "--max_tokens", "5"]
    monkeypatch.setattr(sys, "argv", words)
    with sole_use(tmp_path):
        text = (tmp_path / LOCK_FILE).read_text()
    assert "s3cret" not in text and "--hub_token *** --api-key *** --max_tokens 5" in text
