"""Hugging Face data as the `datasets` library itself writes it."""

import json

import pytest
from PIL import Image

from vlm_sft_rl.data.convert import convert
from vlm_sft_rl.data.images import open_image
from vlm_sft_rl.data.validate import validate
from vlm_sft_rl.errors import UserError

datasets = pytest.importorskip("datasets")


def pictures(count):
    return [Image.effect_noise((8 + i, 6), 50).convert("RGB") for i in range(count)]


@pytest.fixture(scope="module")
def dataset():
    images = pictures(3)
    rows = {
        "image": [images[0], images[1], images[0], images[2]],
        "problem": [f"question {i}" for i in range(4)],
        "solution": ["1", "2", "yes", "blue"],
        "note": [None, "kept", None, None],
    }
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def save(dataset, folder, kind):
    if kind == "disk":
        dataset.save_to_disk(folder / "d", num_shards=2)
        return folder / "d"
    (folder / "data").mkdir()
    if kind == "file":
        dataset.to_parquet(folder / "data/all.parquet")
        return folder / "data/all.parquet"
    for i in range(2):
        dataset.shard(2, i, contiguous=True).to_parquet(folder / f"data/train-0000{i}-of-00002.parquet")
    dataset.select([0]).to_parquet(folder / "data/test-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("kind", ["disk", "file", "folder"])
def test_rows_and_pictures(dataset, tmp_path, kind):
    (tmp_path / "source").mkdir()
    source = save(dataset, tmp_path / "source", kind)
    target = tmp_path / "out/rows.jsonl"
    options = {
        "fields": {"question": "problem", "answer": "solution"},
        "split": "train" if kind == "folder" else None,
    }
    assert convert(source, target, "hf", **options) == {"rows": 4, "notes": {}}
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [(r["question"], r["answer"], r["answer_type"]) for r in rows] == [
        ("question 0", "1", "number"), ("question 1", "2", "number"), ("question 2", "yes", "yes_no"),
        ("question 3", "blue", "text"),
    ]  # fmt: skip
    assert "note" not in rows[0] and rows[1]["note"] == "kept"
    for row, picture in zip(rows, dataset["image"], strict=True):
        assert open_image(row["images"][0], tmp_path / "out").tobytes() == picture.tobytes()
    assert len(list((tmp_path / "out/images").iterdir())) == 3, "an image that two rows share is written once"
    assert validate(target, progress=False).ok
    before = target.read_bytes()
    convert(source, target, "hf", **options)
    assert target.read_bytes() == before


def test_conversations_and_lists_of_images(tmp_path):
    turns = [{"role": "user", "content": "<image><image>\nSame?"}, {"role": "assistant", "content": "No."}]
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "messages": datasets.List(
                {"role": datasets.Value("string"), "content": datasets.Value("string")}
            ),
        }
    )
    made = datasets.Dataset.from_dict({"images": [pictures(2)], "messages": [turns]}, features=features)
    made.to_parquet(tmp_path / "a.parquet")
    convert(tmp_path / "a.parquet", tmp_path / "rows.jsonl", "hf", images_dir=tmp_path / "elsewhere/pics")
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert row["messages"] == turns and len(row["images"]) == 2
    assert validate(tmp_path / "rows.jsonl", progress=False).ok


def test_errors(dataset, tmp_path):
    folder = save(dataset, tmp_path, "folder")
    with pytest.raises(UserError, match=r"has the splits test, train\. Name one with --split"):
        convert(folder, tmp_path / "o.jsonl", "hf")
    with pytest.raises(UserError, match="There is no 'val'"):
        convert(folder, tmp_path / "o.jsonl", "hf", split="val")
    with pytest.raises(UserError, match=r"parquet:1: the columns"):
        convert(folder / "data/test-00000-of-00001.parquet", tmp_path / "o.jsonl", "hf")
    (tmp_path / "b.parquet").write_bytes((folder / "data/test-00000-of-00001.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"b.parquet: damaged"):
        convert(tmp_path / "b.parquet", tmp_path / "o.jsonl", "hf")
    with pytest.raises(UserError, match="no parquet files"):
        (tmp_path / "empty").mkdir()
        convert(tmp_path / "empty", tmp_path / "o.jsonl", "hf")
    with pytest.raises(UserError, match="--image-prefix"):
        convert(
            folder, tmp_path / "o.jsonl", "hf", split="test", image_prefix="x", fields={"question": "problem"}
        )
