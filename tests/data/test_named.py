"""Data sets that `datasets` opens: the rows, the checks and the losses are those of a file with the same rows."""

import io
import json

import datasets
import pytest
from datasets import Dataset, DatasetDict
from launched import recipe
from PIL import Image
from tagged_rows import prepared, write_rows

from vlm_sft_rl.data.index import load_train_rows
from vlm_sft_rl.data.named import NamedDataset
from vlm_sft_rl.data.rows import read_pairs, read_rows
from vlm_sft_rl.errors import RowError, UserError
from vlm_sft_rl.io import read_json
from vlm_sft_rl.train import main


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def records(folder, *, inside, column="images", count=8):
    """The rows of `write_rows` as TRL's messages; pictures as paths, or inside."""
    rows = []
    for row in read_rows(write_rows(folder, count)):
        keys = ("role", "content", "hint", "answer_type")
        messages = [{key: message.get(key) for key in keys} for message in row["messages"]]
        (name,) = row["images"]
        picture = {"bytes": (folder / name).read_bytes(), "path": None} if inside else name
        rows.append(
            {"id": row["id"], "messages": messages, column: picture if column == "image" else [picture]}
        )
    return rows


def folder_of(kind, rows, target):
    """The rows as a folder that `datasets` opens."""
    dataset = Dataset.from_list(rows)
    if kind == "saved":
        DatasetDict({"train": dataset}).save_to_disk(target)
        return target
    target.mkdir()
    if kind == "parquet":
        dataset.to_parquet(target / "train.parquet")
    else:
        (target / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_rows_by_path_are_those_of_the_file(kind, tmp_path):
    folder = folder_of(kind, records(tmp_path / "files", inside=False), tmp_path / "set")
    rows = NamedDataset(str(folder)).train_rows()
    expected = load_train_rows(tmp_path / "files" / "rows.json")
    assert rows.column_names == expected.column_names
    for row, other in zip(rows, expected, strict=True):
        assert {**row, "source": ""} == {**other, "source": ""}
    assert [row["source"] for row in rows] == [f"{folder}[train]:{i}" for i in range(1, 9)]


@pytest.mark.parametrize("column", ["image", "images"])
@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_pictures_inside_stay_encoded_until_they_are_wanted(kind, column, tmp_path):
    rows = records(tmp_path / "files", inside=True, column=column)
    named = NamedDataset(str(folder_of(kind, rows, tmp_path / "set")))
    read = named.train_rows(subsample=3, seed=1)
    again = named.train_rows(subsample=3, seed=1)
    chosen = [int(row["id"].removeprefix("row-")) for row in read]
    assert len(set(chosen)) == 3 and chosen == sorted(chosen) and list(read) == list(again)
    for row, i in zip(read, chosen, strict=True):
        (picture,) = row["images"] if column == "images" else [row["images"]]
        assert picture["bytes"] == (tmp_path / "files" / f"{i}.png").read_bytes()


def test_rows_without_a_picture_lie_beside_rows_with_one(tmp_path):
    rows = records(tmp_path / "files", inside=True)
    rows[2]["images"] = []
    rows[2]["messages"][0]["content"] = "What is there?"
    read = NamedDataset(str(folder_of("parquet", rows, tmp_path / "set"))).train_rows()
    assert [len(row["images"]) for row in read] == [1, 1, 0, 1, 1, 1, 1, 1]


def test_a_bad_row_is_named_by_its_number(tmp_path):
    rows = records(tmp_path / "files", inside=True)
    rows[2]["messages"] = []
    with pytest.raises(RowError, match=r"\[train\]:3: .*messages"):
        NamedDataset(str(folder_of("parquet", rows, tmp_path / "set"))).train_rows()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"name": "./nowhere/at/all"}, "no such folder, and no name of a data set"),
        ({"name": "set", "split": "tset"}, "cannot be opened .*tset|no split 'tset', but train"),
        ({"name": "set", "config": "de"}, "cannot be opened .*de"),
    ],
)
def test_what_cannot_be_opened_is_one_message(options, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder_of("parquet", records(tmp_path / "files", inside=False), tmp_path / "set")
    with pytest.raises(UserError, match=complaint):
        NamedDataset(**options).train_rows()


def test_preference_rows(tmp_path):
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "PNG")
    pair = {"prompt": "<image>\nWhat?", "chosen": "A cat.", "rejected": "A dog."}
    rows = [{**pair, "images": [{"bytes": data.getvalue(), "path": None}]}]
    (read,) = read_pairs(NamedDataset(str(folder_of("saved", rows, tmp_path / "set"))))
    assert read["images"][0]["bytes"] == data.getvalue() and read["chosen"][0]["content"] == "A cat."


def losses(folder):
    return [
        entry["loss"] for entry in read_json(folder / "trainer_state.json")["log_history"] if "loss" in entry
    ]


def train(path, out, *words):
    assert main(["--config", str(path), "--output_dir", str(out), "--logging_steps", "1", *words]) == 0
    return losses(out)


def test_training_is_the_same_from_a_file_and_from_a_data_set(tmp_path):
    prepared(tmp_path)
    path = recipe(tmp_path)
    expected = train(path, tmp_path / "a")
    source = tmp_path / "files"
    inside = folder_of("parquet", records(source, inside=True, count=16), tmp_path / "inside")
    assert train(path, tmp_path / "b", "--dataset_name", str(inside)) == expected
    streamed = ("--dataset_name", str(inside), "--streaming", "true")
    first = train(path, tmp_path / "c", *streamed)
    # another order, the same rows
    assert len(first) == len(expected) and first == train(path, tmp_path / "d", *streamed)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--dataset_name", "set", "--train_file", "rows.json"], "both name the training rows"),
        (["--train_file", "rows.json", "--streaming", "true"], "`streaming` belongs to `dataset_name`"),
        (["--train_file", "rows.json", "--dataset_config", "x"], "`dataset_config` belongs to"),
        (["--dataset_name", "set", "--streaming", "true", "--max_steps", "-1"], "`max_steps`: how many rows"),
        (["--dataset_name", "set", "--streaming", "true", "--subsample", "2"], "`subsample`: rows are drawn"),
        (
            ["--dataset_name", "set", "--streaming", "true", "--vision_packing", "image"],
            "`vision_packing`: packs are planned",
        ),
        (
            ["--dataset_name", "set", "--streaming", "true", "--train_sampling_strategy", "group_by_length"],
            "group_by_length needs the rows' lengths",
        ),
    ],
)
def test_what_excludes_each_other_is_refused(words, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder_of("parquet", records(tmp_path / "files", inside=True), tmp_path / "set")
    (tmp_path / "recipe.yaml").write_text(
        "method: reverse\nmodel_name_or_path: base\nmax_steps: 2\nuse_cpu: true\n"
    )
    assert main(["--config", "recipe.yaml", "--dry-run", *words]) == 2
    assert complaint in " ".join(capsys.readouterr().err.split())
