"""The file of skipped rows, written by real processes."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections import Counter

import pytest
from json_lines import read_lines
from PIL import Image

from vlm_sft_rl.data.rejects import Rejects, identity
from vlm_sft_rl.errors import FORMAT, TOO_LONG, RowError, UserError


def row(i):
    return {"id": f"r{i}", "source": f"rows.json:{i}"}


def add_all(path, first, last):
    rejects = Rejects(path)
    for _ in range(2):  # two epochs
        for i in range(first, last):
            rejects.add(row(i), RowError(TOO_LONG if i % 2 else FORMAT, f"reason {i}"))


def test_processes_that_overlap_write_every_row_once(tmp_path):
    path = tmp_path / "rejects.jsonl"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=add_all, args=(path, i * 40, i * 40 + 100)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    lines = read_lines(path)
    assert sorted(int(r["id"][1:]) for r in lines) == list(range(220))
    assert all(r["source"] == f"rows.json:{r['id'][1:]}" and r["reason"] for r in lines)
    late = Rejects(path)
    assert late.counts() == {TOO_LONG: 110, FORMAT: 110}
    assert late.add(row(7), RowError(FORMAT, "again")) == 0
    assert late.add(row(999), RowError(FORMAT, "x")) == 221
    assert "221 rows were skipped (111 format, 110 too long)" in late.summary()


ENDLESS = """
import sys
from vlm_sft_rl.errors import RowError
from vlm_sft_rl.data.rejects import Rejects
rejects, i = Rejects(sys.argv[1]), 0
while True:
    rejects.add({"id": i}, RowError("format", "x" * 200))
    print(i, flush=True)
    i += 1
"""


def test_a_killed_process_loses_no_row_and_leaves_no_lock(tmp_path):
    path = tmp_path / "rejects.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    while int(process.stdout.readline()) < 50:
        pass
    process.send_signal(signal.SIGKILL)
    told = [int(line) for line in process.communicate()[0].split()]
    rejects = Rejects(path)
    before = rejects.counts().total()
    assert before >= max(told, default=50) + 1
    assert rejects.add({"id": "after"}, RowError(FORMAT, "y")) == before + 1
    assert len({r["id"] for r in read_lines(path)}) == len(read_lines(path)) == before + 1


def test_a_line_that_was_cut_off_is_replaced(tmp_path):
    path = tmp_path / "rejects.jsonl"
    Rejects(path).add(row(1), RowError(FORMAT, "a"))
    with open(path, "a") as handle:
        handle.write('{"id": "r2", "sour')
    Rejects(path).add(row(3), RowError(FORMAT, "b"))
    assert [r["id"] for r in read_lines(path)] == ["r1", "r3"]


@pytest.mark.parametrize("notes", ["my notes\n", "my notes"])
def test_a_file_of_something_else_is_not_touched(tmp_path, notes):
    path = tmp_path / "notes.txt"
    path.write_text(notes)
    with pytest.raises(UserError, match=r"notes\.txt.*no skipped row"):
        Rejects(path).add(row(1), RowError(FORMAT, "a"))
    with pytest.raises(UserError, match="no skipped row"):
        Rejects(path).clear()
    assert path.read_text() == notes


def test_clearing_is_seen_by_others(tmp_path):
    one, two = Rejects(tmp_path / "r.jsonl"), Rejects(tmp_path / "r.jsonl")
    one.add(row(1), RowError(FORMAT, "a"))
    assert two.counts().total() == 1 and two.summary().startswith("1 row was skipped")
    one.clear()
    assert two.counts() == Counter() and two.summary() == ""
    two.add(row(2), RowError(FORMAT, "a"))
    assert one.counts().total() == 1
    one.clear()
    for i in (3, 4, 5):  # more than `two` had read
        one.add(row(i), RowError(FORMAT, "b"))
    assert two.add(row(2), RowError(FORMAT, "a")) == 0, "it does not know yet that the file is a new one"
    assert two.counts().total() == 3 and two.add(row(2), RowError(FORMAT, "a")) == 4


def fill(path):
    """With at most a kilobyte a file, as a quota would have it."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        for i in range(100):
            Rejects(path).add(row(i), RowError(FORMAT, "x" * 90))
    except UserError as error:
        os._exit(7 if "rejects_file" in str(error) else 8)
    os._exit(9)


def test_a_full_disk_is_one_message_and_whole_lines(tmp_path):
    path = tmp_path / "rejects.jsonl"
    process = multiprocessing.get_context("fork").Process(target=fill, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == 7
    assert 3 < len(read_lines(path)) < 10


def test_rows_without_id_are_told_apart_by_their_content():
    first, again, other = (
        {"messages": [{"role": "user", "content": [{"image": Image.new("RGB", (4, 4))}, text]}], "images": []}
        for text in "aab"
    )
    assert identity(first) == identity(again) != identity(other)
    assert identity({"id": 0, "source": "coco"}) == "row 0"
    assert identity({"id": 0}) == "row 0" and identity({"id": 0, "source": "f:1"}) == "f:1"
