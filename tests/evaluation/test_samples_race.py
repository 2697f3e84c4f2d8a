"""Reading samples while another process merges them: nothing that was answered is ever missed."""

import threading

import pytest

from vlm_sft_rl.evaluation.samples import collect, cut_broken_end, merge, shard_path
from vlm_sft_rl.io import write_jsonl


def sample(i):
    return {"id": f"q{i}", "answer": "a", "tagged_answer": "a", "spans": [], "counts": {}, "reference": {}}


@pytest.mark.parametrize("merged_before", [0, 10])
def test_every_sample_is_found_during_a_merge(tmp_path, merged_before):
    ids = [f"q{i}" for i in range(40)]
    for attempt in range(40):
        folder = tmp_path / str(attempt)
        if merged_before:
            write_jsonl(folder / "samples.jsonl", map(sample, range(merged_before)))
        for rank in range(4):
            write_jsonl(shard_path(folder, rank, 4), map(sample, range(merged_before + rank, 40, 4)))
        found, merged = [], threading.Event()

        def look(folder=folder, found=found, merged=merged):
            while not merged.is_set():
                found.append(len(collect(folder)))
            found.append(len(collect(folder)))

        reader = threading.Thread(target=look)
        reader.start()
        merge(folder, ids, collect(folder))
        merged.set()
        reader.join()
        assert set(found) == {40}, attempt


def test_a_shard_that_is_gone_has_no_broken_end(tmp_path):
    assert cut_broken_end(tmp_path / "samples.rank1-of-2.jsonl") is False
