"""Hugging Face data as the `datasets` library itself writes it."""

import datetime
import decimal
import io
import json
import math

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from json_lines import read_lines
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
        return report, read_lines(target)

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


# --- What others may have put there ---


def png(size=(4, 4)):
    stream = io.BytesIO()
    Image.new("RGB", size).save(stream, "PNG")
    return stream.getvalue()


def parquet(path, **columns):
    pq.write_table(pa.table({name: [value] for name, value in columns.items()}), path)
    return path


@pytest.mark.parametrize(
    "name", ["../../secret.arrow", "/etc/hostname", "link.arrow", "a\0b", "none.arrow", None, "x" * 5000, "."]
)
def test_a_data_set_names_no_file_outside_of_its_folder(dataset, tmp_path, name):
    dataset.save_to_disk(tmp_path / "secret")
    data = next((tmp_path / "secret").glob("*.arrow"))
    (tmp_path / "secret.arrow").write_bytes(data.read_bytes())
    folder = tmp_path / "sets/d"
    folder.mkdir(parents=True)
    (folder / "link.arrow").symlink_to(tmp_path / "secret.arrow")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(UserError, match=r"lies outside|not there|usable path") as caught:
        convert(folder, tmp_path / "o.jsonl", "hf")
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("splits", [["../secret"], ["/etc"], ["/"], [".."], ["."], [""], "train", [1], None])
def test_a_data_set_names_no_split_outside_of_its_folder(dataset, tmp_path, splits):
    dataset.save_to_disk(tmp_path / "secret")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/dataset_dict.json").write_text(json.dumps({"splits": splits}))
    with pytest.raises(UserError, match=r"lies outside|no list `splits`|no parquet files"):
        convert(tmp_path / "d", tmp_path / "o.jsonl", "hf")


@pytest.mark.parametrize("state", ["[]", "{}", "nothing", '{"_data_files": [1]}', '{"_data_files": []}'])
def test_a_broken_state_file_is_one_message(tmp_path, state):
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(UserError, match=r"state\.json|no parquet files"):
        convert(tmp_path, tmp_path / "o.jsonl", "hf")


def test_a_snapshot_of_the_hubs_cache_is_a_folder_of_links(tmp_path):
    blobs, snapshot = tmp_path / "cache/blobs", tmp_path / "cache/snapshots/abc/data"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    parquet(blobs / "1234", question="Which?", answer="3", image={"bytes": png(), "path": None})
    (snapshot / "train-0.parquet").symlink_to("../../../blobs/1234")
    assert convert(tmp_path / "cache/snapshots/abc", tmp_path / "o.jsonl", "hf")["rows"] == 1
    (tmp_path / "elsewhere").write_bytes((blobs / "1234").read_bytes())
    (snapshot / "train-1.parquet").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="lies outside"):
        convert(tmp_path / "cache/snapshots/abc", tmp_path / "o.jsonl", "hf")


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_file_cut_anywhere_is_one_message(tmp_path, dataset, suffix):
    dataset = dataset.select_columns(["problem", "solution"]).rename_columns(
        {"problem": "question", "solution": "answer"}
    )
    if suffix == "parquet":
        dataset.to_parquet(tmp_path / "whole")
    else:
        dataset.save_to_disk(tmp_path / "d")
        next((tmp_path / "d").glob("*.arrow")).rename(tmp_path / "whole")
    data, cut = (tmp_path / "whole").read_bytes(), tmp_path / f"cut.{suffix}"
    cut.write_bytes(data)
    assert convert(cut, tmp_path / "o.jsonl", "hf")["rows"] == 4
    for length in range(0, len(data), max(1, len(data) // 60)):
        cut.write_bytes(data[:length])
        with pytest.raises(UserError, match=rf"cut\.{suffix}: damaged"):
            convert(cut, tmp_path / "o.jsonl", "hf")
    for place in range(0, len(data), max(1, len(data) // 60)):
        cut.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        try:
            convert(cut, tmp_path / "o.jsonl", "hf")
        except UserError as error:
            assert "cut." in str(error)


def test_values_that_json_has_not(tmp_path, converted):
    day = datetime.date(2026, 1, 2)
    more = {
        "when": day,
        "price": decimal.Decimal("1.50"),
        "level": math.nan,
        "took": datetime.timedelta(seconds=3),
    }
    path = parquet(tmp_path / "a.parquet", question="Which?", answer="3", image=png(), **more)
    report, (row,) = converted(path)
    assert (row["when"], row["price"], row["took"]) == ("2026-01-02", "1.50", "0:00:03")
    assert "level" not in row and report["notes"] == {"column 'level' left out where it is NaN": 1}
    assert open_image(row["images"][0], tmp_path / "out").size == (4, 4)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"question": "Which?", "answer": math.nan}, "field `answer`: expected a finite number"),
        ({"question": "Which?", "answer": True}, "field `answer`"),
        ({"question": math.nan, "answer": "x"}, "field `question`"),
        ({"question": "Which?", "answer": "x", "mask": b"\1\2"}, "column 'mask' holds bytes"),
        ({"question": "Which?", "answer": "x", "image": {"bytes": "iVBORw0KGgo=", "path": None}}, "text"),
        ({"question": "Which?", "answer": "x", "image": {"bytes": [137, 80], "path": None}}, "list"),
        ({"question": "Which?", "answer": "x", "image": {"bytes": b"GIF89a", "path": None}}, "cannot be read"),
        ({"id": math.nan, "question": "Which?", "answer": "x"}, "field `id`"),
        ({"bbox": [1.0, 2.0, math.nan, 4.0], "image": "a.png", "width": 9, "height": 9}, "four numbers"),
        ({"nothing": 1}, "make no row"),
    ],
)  # fmt: skip
def test_values_that_make_no_row(tmp_path, columns, message):
    with pytest.raises(UserError, match=rf"a\.parquet:1: .*{message}"):
        convert(parquet(tmp_path / "a.parquet", **columns), tmp_path / "o.jsonl", "hf")


@pytest.mark.parametrize("answer, name", [(0, "cup"), (1, "sun")])
def test_classes_have_their_names(tmp_path, answer, name):
    features = {"question": datasets.Value("string"), "answer": datasets.ClassLabel(names=["cup", "sun"])}
    rows = datasets.Dataset.from_list([{"question": "q", "answer": answer}], datasets.Features(features))
    rows.to_parquet(str(tmp_path / "a.parquet"))
    convert(tmp_path / "a.parquet", tmp_path / "rows.jsonl", "hf")
    assert json.loads((tmp_path / "rows.jsonl").read_text())["answer"] == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"info": 3}',
        '{"info": {"features": {"answer": 3, "question": {"_type": "ClassLabel"}}}}',
    ],
)
def test_notes_of_a_data_set_that_make_no_sense_are_left(tmp_path, text):
    table = pa.table({"question": ["q"], "answer": [1]}).replace_schema_metadata({"huggingface": text})
    pq.write_table(table, tmp_path / "a.parquet")
    convert(tmp_path / "a.parquet", tmp_path / "rows.jsonl", "hf")
    assert json.loads((tmp_path / "rows.jsonl").read_text())["answer"] == "1"
