"""Files and folders on the disk: their modes, what a killed run leaves there, and places that cannot be written."""

import os
import stat
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from vlm_sft_rl import io
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.io import new_folder, replacing

WRITER = """
import sys, time
from pathlib import Path
from vlm_sft_rl import io
kind, folder = sys.argv[1], Path(sys.argv[2])
if kind == "file":
    with io.replacing(folder / "rows.jsonl") as handle:
        handle.write("half")
        handle.flush()
        print("writing", flush=True)
        time.sleep(600)
else:
    with io.new_folder(folder / "model") as new:
        (new / "weights").write_text("half")
        print("writing", flush=True)
        time.sleep(600)
"""


@pytest.fixture
def writer(tmp_path):
    """A process that is in the middle of writing `rows.jsonl` or `model` in a folder."""
    started = []

    def start(kind):
        words = [sys.executable, "-c", WRITER, kind, str(tmp_path)]
        started.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "writing\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_run_left_is_removed_and_what_a_living_one_writes_is_not(
    tmp_path, writer, kind, monkeypatch
):
    process = writer(kind)
    (left,) = tmp_path.glob(".*.unfinished")
    for text in ("one", "two"):
        monkeypatch.setattr(io, "_SWEPT", set())  # as another process
        io.write_text(tmp_path / "other.txt", text)
        assert left.exists() and (tmp_path / "other.txt").read_text() == text
    process.kill()
    process.wait()
    assert left.exists()
    monkeypatch.setattr(io, "_SWEPT", set())
    io.write_text(tmp_path / "other.txt", "three")
    assert {path.name for path in tmp_path.iterdir()} - {".model.lock"} == {"other.txt"}


def test_a_folder_that_another_process_is_writing_is_refused(tmp_path, writer):
    process = writer("folder")
    with pytest.raises(UserError, match="is writing there"), new_folder(tmp_path / "model"):
        raise AssertionError("not reached")
    assert (tmp_path / ".model.unfinished" / "weights").read_text() == "half"
    process.kill()
    process.wait()
    with new_folder(tmp_path / "model") as folder:
        assert list(folder.iterdir()) == []
        (folder / "weights").write_text("whole")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "weights"]


@pytest.mark.parametrize(
    ("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o007, 0o660, 0o770), (0o077, 0o600, 0o700)]
)
def test_new_files_and_folders_have_the_mode_that_the_user_wants(tmp_path, umask, file, folder):
    before = os.umask(umask)
    try:
        io.write_text(tmp_path / "a" / "x.txt", "x")
        io.append_jsonl(tmp_path / "b" / "x.jsonl", [{}])
        with new_folder(tmp_path / "c") as new:
            save_file({"a": torch.zeros(1)}, new / "x.safetensors")
    finally:
        os.umask(before)
    modes = {p.relative_to(tmp_path).as_posix(): p.stat().st_mode & 0o777 for p in tmp_path.rglob("*")}
    assert {modes[name] for name in "abc"} == {folder}
    assert modes["a/x.txt"] == modes["b/x.jsonl"] == file


@pytest.mark.parametrize("blocked", ["file/x", "folder"])
def test_a_place_that_cannot_be_written_is_one_message(tmp_path, blocked):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    path = tmp_path / blocked
    for write in (io.write_text, io.write_json, lambda p, v: io.append_jsonl(p, [{}])):
        with pytest.raises(UserError, match=r"cannot write .*Choose another folder|exists and is no file"):
            write(path, "x")
    assert (tmp_path / "file").read_text() == "mine" and sorted(p.name for p in tmp_path.iterdir()) == [
        "file",
        "folder",
    ]


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(UserError, match="exists and is no file"), replacing(path):
            pass
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.parametrize("name", ["x" * 300, "loop", "no/file"])
def test_a_path_that_cannot_be_used_is_one_message(tmp_path, name):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "no").touch()
    for words in (
        ["data", "validate", name],
        ["data", "convert", name, "b.jsonl"],
        ["data", "convert", "a.jsonl", name],
    ):
        (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "a"}\n')
        run = subprocess.run(
            [sys.executable, "-m", "vlm_sft_rl.cli", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 2 and "Traceback" not in run.stderr, run.stderr
        assert "Error:" in run.stderr
