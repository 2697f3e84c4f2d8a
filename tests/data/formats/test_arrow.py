"""Hugging Face data as the `datasets` library itself writes it."""

import json

import datasets
import pytest
from PIL import Image

from vlm_sft_rl.data.convert import convert
from vlm_sft_rl.data.images import open_image
from vlm_sft_rl.data.validate import validate
from vlm_sft_rl.errors import UserError

PICTURES = [Image.effect_noise((8 + i, 6), 50).convert("RGB") for i in range(3)]
TEXT = datasets.Value("string")


@pytest.fixture(scope="module")
def dataset():
    rows = {
        "image": [PICTURES[0], PICTURES[1], PICTURES[0], PICTURES[2]],
        "problem": [f"question {i}" for i in range(4)],
        "solution": ["1", "2", "yes", "blue"],
        "note": [None, "kept", None, None],
    }
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def save(dataset, folder, kind):
    if kind == "disk":
        dataset.save_to_disk(folder / "d", num_shards=2)
        return folder / "d"
    if kind == "file":
        dataset.to_parquet(folder / "all.parquet")
        return folder / "all.parquet"
    (folder / "data").mkdir()
    for i in range(2):
        dataset.shard(2, i, contiguous=True).to_parquet(folder / f"data/train-0000{i}-of-00002.parquet")
    dataset.select([0]).to_parquet(folder / "data/test-00000-of-00001.parquet")
    return folder


@pytest.fixture
def converted(tmp_path):
    def run(source, **options):
        target = tmp_path / "out/rows.jsonl"
        report = convert(source, target, "hf", **options)
        assert validate(target, progress=False).ok
        return report, [json.loads(line) for line in target.read_text().splitlines()]

    return run


@pytest.mark.parametrize("kind", ["disk", "file", "folder"])
def test_rows_and_pictures(dataset, tmp_path, converted, kind):
    (tmp_path / "source").mkdir()
    source = save(dataset, tmp_path / "source", kind)
    options = {"fields": {"question": "problem", "answer": "solution"}}
    options |= {"split": "train"} if kind == "folder" else {}
    report, rows = converted(source, **options)
    assert report == {"rows": 4, "notes": {}}
    answers = [("1", "number"), ("2", "number"), ("yes", "yes_no"), ("blue", "text")]
    assert [(r["answer"], r["answer_type"]) for r in rows] == answers
    assert [r["question"] for r in rows] == [f"question {i}" for i in range(4)]
    assert "note" not in rows[0] and rows[1]["note"] == "kept"
    for row, picture in zip(rows, dataset["image"], strict=True):
        assert open_image(row["images"][0], tmp_path / "out").tobytes() == picture.tobytes()
    assert len(list((tmp_path / "out/images").iterdir())) == 3, "an image that two rows share is written once"
    assert converted(source, **options)[1] == rows


def test_conversations_and_lists_of_images(tmp_path, converted):
    turns = [{"role": "user", "content": "<image><image>\nSame?"}, {"role": "assistant", "content": "No."}]
    message = datasets.List({"role": TEXT, "content": TEXT})
    features = datasets.Features({"images": datasets.List(datasets.Image()), "messages": message})
    rows = {"images": [PICTURES[:2]], "messages": [turns]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    _, (row,) = converted(tmp_path / "a.parquet", images_dir=tmp_path / "out/elsewhere/pics")
    assert row["messages"] == turns and len(row["images"]) == 2
    assert all(path.startswith("elsewhere/pics/") for path in row["images"])


def test_referring_expressions_as_they_are_shared(tmp_path, converted):
    box = {"bbox": [[4.5, 6.0, 10.0, 50.0]], "answer": [["the cup", "cup"]]}
    rows = datasets.Dataset.from_dict(
        {"question_id": ["469306"], "image": [Image.new("RGB", (40, 30))], **box}
    )
    rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "val.parquet")
    report, (row,) = converted(tmp_path / "val.parquet", box_format="xywh")
    assert (row["width"], row["height"], row["box"]) == (40, 30, [4.5, 6.0, 14.5, 30.0])
    assert row["id"] == "469306" and row["expressions"] == ["the cup", "cup"]
    assert report["notes"] == {"boxes clipped to the image": 1}


def test_errors(dataset, tmp_path):
    folder = save(dataset, tmp_path, "folder")
    test = folder / "data/test-00000-of-00001.parquet"
    (tmp_path / "b.parquet").write_bytes(test.read_bytes()[:-20])
    (tmp_path / "empty").mkdir()
    prefixed = {"split": "test", "image_prefix": "x", "fields": {"question": "problem"}}
    for source, options, message in (
        (folder / "data", {}, r"has the splits test, train\. Name one with --split"),
        (folder / "data", {"split": "val"}, "There is no 'val'"),
        (test, {}, r"parquet:1: the columns"),
        (tmp_path / "b.parquet", {}, r"b.parquet: damaged"),
        (tmp_path / "empty", {}, "no parquet files"),
        (folder / "data", prefixed, "--image-prefix"),
    ):
        with pytest.raises(UserError, match=message):
            convert(source, tmp_path / "o.jsonl", "hf", **options)
