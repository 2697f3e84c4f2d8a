"""Many rows to answers: whatever shard, part or batch a row falls into, killed or not, its answer is the same."""

import dataclasses
import io
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from json_lines import read_lines, write_lines
from PIL import Image
from worlds import write_checkpoint

from vlm_sft_rl.decode import DecodeOptions, Shard, decode
from vlm_sft_rl.errors import RowError, UserError
from vlm_sft_rl.evaluation.results import SAMPLE
from vlm_sft_rl.runs import answer_files
from vlm_sft_rl.shapes import fault

COUNT = 23


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Rows about pictures, with a checkpoint whose answers have phrases."""
    folder = tmp_path_factory.mktemp("world")
    write_checkpoint(folder / "model")
    for i in range(COUNT):
        Image.new("RGB", (28, 28), (10 * i, 90, 200 - 5 * i)).save(folder / f"{i}.png")
    rows = [{"id": f"q{i}", "images": [f"{i}.png"], "question": f"What is {i}?"} for i in range(COUNT)]
    write_lines(folder / "rows.jsonl", rows)
    return folder


def run(world, output, *, rows="rows.jsonl", decoder="retrospective", seed=0, settings=None, **options):
    options = {"shard_rows": 10, "image_root": world} | options
    settings = {"max_new_tokens": 12} | (settings or {})
    path = world / rows
    return decode(
        path, output, world / "model", decoder, settings=settings, seed=seed, options=DecodeOptions(**options)
    )


def lines_of(output):
    return [line for path in sorted(output.glob("shard-?????.jsonl")) for line in read_lines(path)]


def content(lines):
    """What may not depend on how the work was shared; probabilities of floats do in their last digits."""
    return [
        {key: line[key] for key in ("row", "id", "tagged_answer", "answer", "ok", "images")} for line in lines
    ]


@pytest.fixture(scope="module", params=["retrospective", "sample"])
def whole(request, world, tmp_path_factory):
    """A decoder that draws, and its answers in one shard."""
    output = tmp_path_factory.mktemp("whole")
    run(world, output, decoder=request.param, shard_rows=100)
    return request.param, content(lines_of(output))


def test_a_line_has_what_an_evaluation_writes_and_its_row(world, tmp_path):
    report = run(world, tmp_path, traces=True)
    lines = lines_of(tmp_path)
    assert [(line["row"], line["id"]) for line in lines] == [(i, f"q{i}") for i in range(COUNT)]
    assert [fault(line, SAMPLE) for line in lines] == [None] * COUNT
    assert any(line["spans"] for line in lines) and all(line["trace"] for line in lines)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "run.json", "shard-00000.jsonl", "shard-00001.jsonl", "shard-00002.jsonl",
    ]  # fmt: skip
    flagged = sum(not line["ok"] for line in lines)
    assert dataclasses.astuple(report) == (COUNT, COUNT, COUNT, flagged, 0)
    assert run(world, tmp_path, traces=True).answered == 0


@pytest.mark.parametrize("shard_rows, batch_size", [(10, 8), (7, 1), (1, 3)])
def test_answers_depend_on_no_shard_and_no_batch(world, whole, tmp_path, shard_rows, batch_size):
    decoder, expected = whole
    run(world, tmp_path, decoder=decoder, shard_rows=shard_rows, batch_size=batch_size)
    assert content(lines_of(tmp_path)) == expected
    run(world, tmp_path / "other", decoder=decoder, seed=1, shard_rows=shard_rows, batch_size=batch_size)
    assert content(lines_of(tmp_path / "other")) != expected


def test_parts_make_the_same_shards(world, whole, tmp_path):
    decoder, expected = whole
    finished = [
        run(world, tmp_path, decoder=decoder, shard_rows=4, part=f"{k}/4").finished for k in (3, 0, 2, 1)
    ]
    assert finished == [4, 12, 16, 23] and content(lines_of(tmp_path)) == expected


def test_answers_are_read_when_all_of_them_are_there(world, tmp_path):
    run(world, tmp_path, decoder="greedy", shard_rows=8, part="1/2")
    with pytest.raises(UserError, match="2 of its 3 shards are not finished, the first is shard-00000"):
        answer_files(tmp_path)
    run(world, tmp_path, decoder="greedy", shard_rows=8)
    (tmp_path / "shard-00000.part.jsonl").write_text("")  # killed before it removed this
    files = answer_files(tmp_path)
    assert [line["row"] for file in files for line in read_lines(file)] == list(range(COUNT))
    assert answer_files(files[1]) == files[1:2]
    (tmp_path / "run.json").unlink()
    with pytest.raises(UserError, match=r"no run\.json in it\. Give a JSONL"):
        answer_files(tmp_path)


def test_processes_of_a_launcher_take_parts(world, whole, tmp_path, monkeypatch):
    decoder, expected = whole
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        run(world, tmp_path, decoder=decoder, shard_rows=5)
    assert content(lines_of(tmp_path)) == expected


def test_a_line_that_another_process_is_writing_is_left_alone(world, tmp_path):
    run(world, tmp_path)
    lines = read_lines(tmp_path / "shard-00002.jsonl")
    (tmp_path / "shard-00002.jsonl").unlink()
    shard = Shard(tmp_path, 2, range(20, 23))
    write_lines(shard.part, lines[:1])
    half = json.dumps(lines[1])[:-9]
    with shard.part.open("a") as other:
        other.write(half)
    assert shard.answered() == {20} and shard.part.read_text().endswith(half)
    # the other process was killed: its half line goes, once this one holds the lock
    assert shard.add(lines[1:]) == lines[1:] and read_lines(shard.path) == lines


@pytest.mark.parametrize("kept, torn", [(0, "{"), (3, '{"row": 7, "id'), (4, '{"row": 9}\n'), (10, "")])
def test_a_killed_run_goes_on_after_its_last_whole_line(world, whole, tmp_path, kept, torn):
    decoder, expected = whole
    run(world, tmp_path, decoder=decoder)
    shard = tmp_path / "shard-00000.jsonl"
    lines = shard.read_text().splitlines(keepends=True)
    shard.with_suffix(".part.jsonl").write_text("".join(lines[::-1][:kept]) + torn)
    shard.unlink()
    if torn.endswith("\n"):
        with pytest.raises(UserError, match=r"part\.jsonl, line 5: .*(id|twice).*Remove this line"):
            run(world, tmp_path, decoder=decoder)
        return
    assert run(world, tmp_path, decoder=decoder).answered == 10 - kept
    assert content(lines_of(tmp_path)) == expected and not list(tmp_path.glob("*.part.jsonl"))


def test_lines_that_another_process_wrote_meanwhile_are_not_written_twice(world, tmp_path):
    run(world, tmp_path)
    lines = read_lines(tmp_path / "shard-00002.jsonl")
    (tmp_path / "shard-00002.jsonl").unlink()
    late = Shard(tmp_path, 2, range(20, 23))
    assert late.answered() == frozenset()
    write_lines(late.part, lines[:2])
    assert late.add(lines) == lines[2:]
    assert read_lines(late.path) == lines and not late.part.exists()
    assert Shard(tmp_path, 2, range(20, 23)).add(lines) == []


def test_a_process_of_a_launcher_holds_its_shard_against_another_launch(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    words = (
        "import sys, time; from pathlib import Path; from vlm_sft_rl.decode import Shard; shard = Shard(Path("
    )
    words += "sys.argv[1]), 1, range(2, 4)); shard.add([{'row': 2, 'id': '2'}]); print('held', flush=True); time.sleep(600)"
    other = subprocess.Popen([sys.executable, "-c", words, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {other.pid} on .* is writing there"):
            Shard(tmp_path, 1, range(2, 4)).add([{"row": 3, "id": "3"}])
    finally:
        other.kill()
        other.wait()


def test_answers_whose_manifest_is_gone_are_not_taken_for_others(world, tmp_path):
    run(world, tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(UserError, match=r"holds answers but no run\.json.*Choose another folder"):
        run(world, tmp_path, decoder="greedy")
    assert not (tmp_path / "run.json").exists()


@pytest.mark.parametrize(
    "change, key",
    [
        ({"seed": 1}, r"decoding\.seed: 0 -> 1"),
        ({"settings": {"max_new_tokens": 11}}, "max_new_tokens: 12 -> 11"),
        ({"shard_rows": 11}, "shard_rows: 10 -> 11"),
        ({"prompt": "Who?"}, "prompt: None -> 'Who.'"),
        ({"rows": "more.jsonl"}, "rows: "),
        ({"traces": True}, "traces: False -> True"),
    ],
)
def test_a_folder_belongs_to_one_configuration(world, tmp_path, change, key):
    write_lines(world / "more.jsonl", [*read_lines(world / "rows.jsonl"), {"question": "And?"}])
    run(world, tmp_path, part="2/3")
    with pytest.raises(UserError, match=f"{key}.*Choose another folder"):
        run(world, tmp_path, **change)


BAD = {
    "absent.png": "does not exist",
    "../out.png": "outside of image_root",
    "torn.png": "cannot be read|damaged",
}


@pytest.mark.parametrize("image, reason", BAD.items())
def test_a_bad_row_ends_the_run_or_is_told_in_its_place(world, tmp_path, image, reason):
    (world / "torn.png").write_bytes((world / "0.png").read_bytes()[:40])
    rows = read_lines(world / "rows.jsonl")[:12]
    rows[4]["images"], rows[11]["question"] = [image], " "
    write_lines(world / "bad.jsonl", rows)
    with pytest.raises(RowError, match=rf"bad\.jsonl:5: .*({reason})"):
        run(world, tmp_path / "error", rows="bad.jsonl")
    report = run(world, tmp_path / "skip", rows="bad.jsonl", on_bad_row="skip")
    lines = lines_of(tmp_path / "skip")
    assert report.bad == 2 and report.finished == 12 and "2 could not be used" in str(report)
    assert [line["row"] for line in lines if "error" in line] == [4, 11]
    assert [line["row"] for line in lines] == list(range(12)) and "answer" not in lines[4]


def test_an_id_that_comes_twice_is_refused(world, tmp_path):
    rows = read_lines(world / "rows.jsonl")[:6]
    rows[5]["id"] = "q2"
    write_lines(world / "twice.jsonl", rows)
    with pytest.raises(RowError, match=r"twice\.jsonl:6: the id 'q2' is already that of .*twice\.jsonl:3"):
        run(world, tmp_path, rows="twice.jsonl")


def test_pictures_inside_of_a_parquet_file_are_named_by_their_content_or_path(world, tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (28, 28), "red").save(buffer, "PNG")
    images = [{"bytes": buffer.getvalue(), "path": path} for path in (None, "red.png")]
    pq.write_table(pa.Table.from_pylist([{"image": image} for image in images]), tmp_path / "rows.parquet")
    report = run(
        world, tmp_path / "out", rows=tmp_path / "rows.parquet", prompt="What is it?", decoder="greedy"
    )
    first, second = lines_of(tmp_path / "out")
    assert report.finished == 2 and first["answer"] == second["answer"]
    assert len(first["images"][0]) == 20 and second["images"] == ["red.png"] and first["id"] == "rows-1"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"part": "3/3"}, "--part 3/3: expected K/N"),
        ({"part": "a/3"}, "expected K/N"),
        ({"part": "3"}, "expected K/N"),
        ({"decoder": "majority"}, "eval run"),
        ({"decoder": "nothing"}, "does not exist"),
        ({"settings": {"beams": 3}}, "no effect on --decoder retrospective"),
        ({"split": "train"}, "no splits"),
        ({"rows": "nothing.jsonl"}, "nothing.jsonl: cannot be opened"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(world, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        run(world, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_command_ends_with_where_the_answers_are(world, tmp_path, capfd, monkeypatch):
    from vlm_sft_rl.cli import app

    words = [
        "vlm-sft-rl", "decode", world / "rows.jsonl", tmp_path / "out", "--model", world / "model",
        "--max-new-tokens", "5", "--part", "0/1", "--shard-rows", "12", "--decoder", "greedy",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", [str(word) for word in words])
    with pytest.raises(SystemExit) as stop:
        app.main()
    shown = capfd.readouterr()
    assert stop.value.code == 0, shown.err
    assert "23 rows answered now, 23 of 23 in finished shards" in shown.out
    assert f"cat {tmp_path}/out/shard-?????.jsonl" in shown.err
    assert json.loads((tmp_path / "out/run.json").read_text())["decoding"]["decoder"] == "greedy"
