import errno
import multiprocessing
import os
import re

import pytest
import torch
from little_room import limit, run_with_little_room
from safetensors.torch import save_file
from tagged_rows import prepared

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.io import is_disk_full, new_folder, read_json, read_jsonl, writing


def full():
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_recognised_behind_other_errors():
    try:
        try:
            full()
        except OSError as error:
            raise RuntimeError("could not save") from error
    except RuntimeError as error:
        assert is_disk_full(error)
    assert not is_disk_full(RuntimeError("shapes differ"))
    assert not is_disk_full(OSError(errno.ENOENT, "No such file"))


def _save_with_little_room(save, folder):
    limit(1000)
    try:
        with writing(folder, "it goes on."):
            save({"a": torch.zeros(100_000)}, str(folder / "weights"))
    except UserError as error:
        os._exit(
            7 if f"{folder}: the disk is full" in str(error) and str(error).endswith("it goes on.") else 8
        )
    os._exit(9)


@pytest.mark.parametrize("save", [torch.save, save_file, lambda value, path: full()])
def test_every_library_s_error_is_one_message(save, tmp_path):
    child = multiprocessing.get_context("fork").Process(target=_save_with_little_room, args=(save, tmp_path))
    child.start()
    child.join()
    assert child.exitcode == 7


def test_other_errors_pass():
    with pytest.raises(ValueError, match="something else"), writing("x"):
        raise ValueError("something else")
    with pytest.raises(UserError, match=r"^mine$"), writing("x"):
        raise UserError("mine")


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    for error in (ValueError("not proved"), KeyboardInterrupt()):
        with pytest.raises(type(error)), new_folder(target) as folder:
            (folder / "weights").write_text("1")
            assert not target.exists()
            raise error
        assert list(tmp_path.iterdir()) == []
    (tmp_path / ".model.unfinished").mkdir()
    (tmp_path / ".model.unfinished" / "old").write_text("of a killed run")
    target.mkdir()  # an empty folder is no obstacle
    with new_folder(target) as folder:
        (folder / "weights").write_text("2")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "weights"]
    with pytest.raises(UserError, match="exists already"), new_folder(target) as folder:
        raise AssertionError("not reached")
    assert (target / "weights").read_text() == "2"


def test_lines_that_are_no_text_or_begin_with_a_mark(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}\n\n{"a": 2}\n')
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (3, {"a": 2})]
    path.write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}')
    assert read_json(path) == {"a": 1}
    path.write_bytes(b'{"a": 1}\n\xff\xfe\x00\n')
    with pytest.raises(UserError, match=r"rows\.jsonl, after line .*not UTF-8"):
        list(read_jsonl(path))
    path.write_text("[1]\n")
    with pytest.raises(UserError, match="line 1: expected one JSON object"):
        list(read_jsonl(path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "room", "kept"),
    [
        (("pocket", "world", "WORLD"), 1_000, None),
        (("pocket", "world", "WORLD"), 100_000, "images/train/train-00000.png"),
        (("pocket", "build", "WORLD"), 2_000, "build/config.json"),
        (("model", "prepare", "BASE", "WORLD"), 20_000, None),
    ],
)
def test_commands_on_a_full_disk_say_so(tmp_path, words, room, kept):
    places = {"WORLD": tmp_path / "out", "BASE": tmp_path / "base"}
    if "BASE" in words:
        prepared(tmp_path)
    done = run_with_little_room(room, *(str(places.get(word, word)) for word in words))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert re.search(r"Error: .*(the disk is full|File too large).*Free some", done.stderr), done.stderr
    if kept:
        assert (tmp_path / "out" / kept).is_file()
