import os
import random

import pytest
import reader
import templates
from json_lines import write_lines

from vlm_sft_rl.data import index as tagged_set
from vlm_sft_rl.data.collators import VisionCollator
from vlm_sft_rl.data.index import index_rows, load_train_rows
from vlm_sft_rl.data.rows import read_rows, sft_row, strip_none
from vlm_sft_rl.errors import UserError


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "tagged.json"
    reader.generate(path, 500)
    return path


def test_dataset_holds_exactly_the_rows_of_the_file(source):
    dataset = load_train_rows(source)
    assert dataset.column_names == ["id", "messages", "images", "source"]
    assert [strip_none(row) for row in dataset] == list(read_rows(source))


def test_rows_from_the_index_go_through_the_collator(source):
    collator = VisionCollator(templates.processor("vicuna", "bpe"), hint_probability=1.0)
    row = {**load_train_rows(source)[3], "images": []}
    row["messages"][0]["content"] = row["messages"][0]["content"].removeprefix("<image>\n")
    assert collator([row])["labels"].shape[0] == 1


def test_index_is_made_once_and_anew_when_the_source_changes(source):
    first = index_rows(source)
    stamp = first.stat().st_mtime_ns
    assert index_rows(source) == first and first.stat().st_mtime_ns == stamp
    reader.generate(source, 501)
    assert index_rows(source) != first and len(load_train_rows(source)) == 501


def test_same_size_and_time_but_other_head_is_another_source(source):
    state, first = source.stat(), index_rows(source)
    source.write_text(source.read_text().replace("000000000", "900000000", 1))
    os.utime(source, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert source.stat().st_size == state.st_size and index_rows(source) != first


def test_an_interrupted_run_leaves_no_index_behind(source, monkeypatch):
    def interrupted(raw, *arguments):
        if raw["id"] == "000000250":
            raise KeyboardInterrupt
        return sft_row(raw, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(tagged_set, "BATCH_ROWS", 100)
        patch.setattr(tagged_set, "sft_row", interrupted)
        with pytest.raises(KeyboardInterrupt):
            index_rows(source)
    assert list((source.parent / ".vlm_sft_rl_index").iterdir()) == []
    assert len(load_train_rows(source)) == 500


def test_truncated_source(source):
    source.write_bytes(source.read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"after byte \d+.*fetch it again"):
        load_train_rows(source)
    assert list((source.parent / ".vlm_sft_rl_index").iterdir()) == []


def test_subsample_is_seeded_and_in_file_order(source):
    drawn = [load_train_rows(source, subsample=50, seed=seed)["id"][:] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [int(i) for i in drawn[0]] == sorted(random.Random(1).sample(range(500), 50))


def test_a_subsample_of_more_than_there_is_takes_all_and_says_so(source, caplog):
    assert len(load_train_rows(source, subsample=501)) == 500
    assert "`subsample` asks for 501 rows and there are 500: all are taken" in caplog.text


@pytest.mark.parametrize("kwargs", [{"subsample": -1}, {"subsample": 0}, {"image_root": "/nowhere"}])
def test_bad_arguments(source, kwargs):
    with pytest.raises(UserError):
        load_train_rows(source, **kwargs)


def test_empty_file(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(UserError, match="no rows"):
        load_train_rows(tmp_path / "a.json")


def test_cache_folder_when_the_source_folder_is_not_to_be_used(source, tmp_path):
    assert index_rows(source, tmp_path / "cache").parent == tmp_path / "cache"
    assert not (source.parent / ".vlm_sft_rl_index").exists()


def test_jsonl_and_mixed_fields(tmp_path):
    path = tmp_path / "a.jsonl"
    answer = {"role": "assistant", "content": "a", "weight": 0}
    rows = [{"question": "q", "answer": "a"}, {"prompt": "q", "completion": [answer]}]
    write_lines(path, rows)
    dataset = load_train_rows(path)
    assert dataset["images"][:] == [[], []] and dataset[1]["messages"][1]["weight"] == 0
    assert dataset["source"][:] == [f"{path}:1", f"{path}:2"]
