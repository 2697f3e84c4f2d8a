"""Folders under a manifest, and files of answers that several processes fill."""

import subprocess
import sys
import threading
from itertools import islice

import pytest
from mutations import mutants
from rich.console import Console

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.results import read_samples
from vlm_sft_rl.io import write_jsonl
from vlm_sft_rl.runs import (
    STAGE_DONE,
    STAGE_STARTED,
    Stages,
    claim,
    collect,
    digest,
    flatten,
    mend_end,
    merge,
    model_digest,
    run_stage,
    shard_path,
)
from vlm_sft_rl.self_training.sampling import _lines, read_store, run_sampling


def sample(name, **fields):
    texts = ("question", "prompt", "answer", "tagged_answer", "accepted_answer", "best_effort_answer")
    counts = ("tokens_forwarded", "tokens_kept", "forwards", "image_encodes", "prompt_tokens")
    line = {"id": name, "ok": True, "reference": {}, "counts": dict.fromkeys(counts, 1)}
    line |= dict.fromkeys(texts, "a") | {key: [] for key in ("images", "spans", "trace")}
    return line | fields


def test_claiming_a_folder(tmp_path):
    claim(tmp_path / "out", {"a": {"b": 1, "c": (1, 2)}})
    claim(tmp_path / "out", {"a": {"b": 1, "c": [1, 2]}})
    with pytest.raises(UserError, match=r"a\.b: 1 -> 2; a\.d: None -> 3"):
        claim(tmp_path / "out", {"a": {"b": 2, "c": [1, 2], "d": 3}})
    assert flatten({"a": {"b": 1}, "c": {}}) == {"a.b": 1, "c": {}}


def test_model_digest_sees_every_part_of_a_large_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(1000))
    before = model_digest(tmp_path)
    (tmp_path / "optimizer.bin").write_bytes(b"x")
    assert model_digest(tmp_path) == before
    path.write_bytes(bytes(999) + b"x")
    assert model_digest(tmp_path) != before
    (tmp_path / "chat_template.jinja").write_text("x")
    assert len({before, model_digest(tmp_path)}) == 2


def test_digests_of_files_and_values(tmp_path):
    (tmp_path / "a").write_text("x")
    first = digest(tmp_path / "a")
    (tmp_path / "a").write_text("y")
    assert digest(tmp_path / "a") != first
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})
    with pytest.raises(UserError, match="cannot be read"):
        digest(tmp_path / "nothing")


def test_a_stage_runs_once_for_each_manifest(tmp_path):
    calls = []
    for _ in range(2):
        run_stage(tmp_path, {"sampling": {"top_k": 50, "stop": []}, "n": 3}, lambda: calls.append(1))
    assert calls == [1]
    before = (tmp_path / STAGE_DONE).read_text()
    with pytest.raises(UserError, match=r"sampling\.top_k: 50 -> 40.*Nothing was changed"):
        run_stage(tmp_path, {"sampling": {"top_k": 40, "stop": []}, "n": 3}, lambda: None)
    assert (tmp_path / STAGE_DONE).read_text() == before


def test_a_stage_that_failed_is_not_done_and_goes_on_under_the_same_manifest_only(tmp_path):
    def fail():
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        run_stage(tmp_path, {"lr": 1.0}, fail)
    assert (tmp_path / STAGE_STARTED).is_file() and not (tmp_path / STAGE_DONE).is_file()
    with pytest.raises(UserError, match=r"lr: 1.0 -> 2.0.*Choose another output_dir"):
        run_stage(tmp_path, {"lr": 2.0}, lambda: None)
    assert run_stage(tmp_path, {"lr": 1.0}, lambda: None) is True
    assert run_stage(tmp_path, {"lr": 1.0}, fail) is False


def test_shards_merge_in_question_order(tmp_path):
    write_jsonl(shard_path(tmp_path, 0, 2), [sample("3"), sample("1")])
    with open(shard_path(tmp_path, 1, 2), "w") as handle:
        handle.write('{"id": "2"}\n{"id": "9", "ans')
    answers = collect(tmp_path)
    assert set(answers) == {"1", "2", "3"}
    assert [s["id"] for s in merge(tmp_path, ["1", "2"], answers)] == ["1", "2"]
    assert not list(tmp_path.glob("samples.rank*"))
    assert list(collect(tmp_path)) == ["1", "2", "3"]
    with pytest.raises(UserError, match="line 2: the field `images` is missing"):
        read_samples(tmp_path)


@pytest.mark.parametrize("merged_before", [0, 10])
def test_every_sample_is_seen_during_a_merge(tmp_path, merged_before):
    ids = [f"q{i}" for i in range(40)]
    for attempt in range(40):
        folder = tmp_path / str(attempt)
        if merged_before:
            write_jsonl(folder / "samples.jsonl", map(sample, ids[:merged_before]))
        for rank in range(4):
            write_jsonl(shard_path(folder, rank, 4), map(sample, ids[merged_before + rank :: 4]))
        counts, merged = [], threading.Event()

        def look(folder=folder, counts=counts, merged=merged):
            while not merged.is_set():
                counts.append(len(collect(folder)))
            counts.append(len(collect(folder)))

        reader = threading.Thread(target=look)
        reader.start()
        merge(folder, ids, collect(folder))
        merged.set()
        reader.join()
        assert set(counts) == {40}, attempt


def test_a_shard_that_is_gone_has_no_broken_end(tmp_path):
    assert mend_end(tmp_path / "samples.rank1-of-2.jsonl") is False


@pytest.mark.parametrize(
    ("tail", "after"),
    [
        (b'{"id": "b", "answer": "x', b""),
        (b'{"id": "b"}', b'{"id": "b"}\n'),  # whole: it only lacks its end
        (b"", b""),
    ],
)
def test_the_end_that_a_killed_run_left_is_mended(tmp_path, tail, after):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b'{"id": "a"}\n' + tail)
    assert mend_end(path) is bool(tail)
    assert path.read_bytes() == b'{"id": "a"}\n' + after


def test_an_end_that_no_run_left_is_refused_and_stays(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b'{"id": "a"}\n' + bytes(40))
    with pytest.raises(UserError, match="40 bytes that are no answer"):
        mend_end(path)
    assert len(path.read_bytes()) == 52


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "line 1: expected an object, found \\[\\]"),
        ('{"id": 3}', "line 1: field `id`: expected text, found 3"),
        ("{}", "line 1: the field `id` is missing"),
        ('{"id": "a"}\n{"id": "a"}', "line 2: the id 'a' is already on line 1"),
        ("\x00", "line 1: not valid JSON"),
        ("[" * 100_000, "line 1: JSON nested deeper"),
        ('{"id": ' + "1" * 5000 + "}", "line 1: a number of thousands of digits"),
    ],
)
def test_lines_that_are_no_answers_are_named(tmp_path, line, message):
    (tmp_path / "samples.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        collect(tmp_path)


def test_two_runs_do_not_share_a_folder(tmp_path):
    run = claim(tmp_path / "out", {"a": 1})
    other = "from vlm_sft_rl.runs import claim\nclaim('out', {'a': 1})\nprint('in')"
    done = subprocess.run([sys.executable, "-c", other], cwd=tmp_path, capture_output=True, text=True)
    assert "is writing there" in done.stderr and "in\n" not in done.stdout
    run.lock.release()
    done = subprocess.run([sys.executable, "-c", other], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "in\n"


def test_reading_samples_refuses_duplicates_and_nothing(tmp_path):
    write_jsonl(tmp_path / "samples.jsonl", [sample("1"), sample("1")])
    with pytest.raises(UserError, match="the id '1' is already on line 1"):
        read_samples(tmp_path)
    write_jsonl(tmp_path / "samples.jsonl", [])
    with pytest.raises(UserError, match="no samples"):
        read_samples(tmp_path)


def test_line_separators_inside_an_answer_do_not_end_its_line(tmp_path):
    write_jsonl(tmp_path / "samples.jsonl", [sample("a", answer="x\u2028y\u0085z")])
    assert collect(tmp_path)["a"]["answer"] == "x\u2028y\u0085z"


def refused_or_done(call, place):
    """Whether a call was refused by a message that names the place; anything else than a UserError is raised."""
    try:
        call()
    except UserError as error:
        assert str(place) in str(error)
        return True
    return False


@pytest.mark.parametrize("file", [STAGE_DONE, STAGE_STARTED, "stages.json"])
def test_mutated_records_of_stages_are_refused_or_do_no_harm(tmp_path, file):
    manifest, quiet = {"model": "m", "sampling": {"stop": [], "top_k": None}, "n": 3}, Console(quiet=True)

    def work():
        if file == "stages.json":
            Stages(tmp_path, quiet, keep_stale=True).run("draw", lambda: None, ["runs.py"])
        else:
            run_stage(tmp_path, manifest, lambda: None)

    work()
    content = (tmp_path / (STAGE_DONE if file == STAGE_STARTED else file)).read_bytes()
    refused = 0
    for _, mutant in islice(mutants(content), 40):
        (tmp_path / STAGE_DONE).unlink(missing_ok=True)
        (tmp_path / file).write_bytes(mutant)
        refused += refused_or_done(work, tmp_path)
        (tmp_path / file).unlink()
    assert refused > 25


def test_a_mutated_store_of_answers_is_refused_or_filled_up(tmp_path):
    tasks = [{"id": f"q{i}", "images": ["a.png"], "prompt": "What?"} for i in range(3)]

    class Sampler:
        def engine(self, sampling, n, seed):
            counts = {"answer": "x", "tokens": 3, "prompt_tokens": 9}
            return lambda part: ([line | counts for line in _lines(t, [{}] * n)] for t in part)

        open = None

        def tasks_per_call(self, n):
            return 2

    def fill():
        run_sampling(
            tmp_path, tasks, 2, {"seed": 0}, Sampler(), sampling={}, seed=0, console=Console(quiet=True)
        )
        return read_store(tmp_path)

    whole = fill()
    content = (tmp_path / "samples.jsonl").read_bytes()
    refused = 0
    for _, mutant in islice(mutants(content), 60):
        (tmp_path / "samples.jsonl").write_bytes(mutant)
        refused += refused_or_done(fill, tmp_path)
        (tmp_path / "samples.jsonl").write_bytes(mutant)
        refused_or_done(lambda: read_store(tmp_path), tmp_path)
    assert refused > 30
    (tmp_path / "samples.jsonl").write_bytes(content[:-30])
    assert fill() == whole
