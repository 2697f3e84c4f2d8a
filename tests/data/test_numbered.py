"""Rows by number from every kind of file, and what a row asks."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Image, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pictures

from vlm_sft_rl.data import numbered
from vlm_sft_rl.data.numbered import HubRows, asked_row, open_rows
from vlm_sft_rl.errors import RowError, UserError

ROWS = [{"id": f"r{i}", "question": f"What is {i}?", "image": f"{i}.png"} for i in range(330)]


def png(shade=0):
    buffer = io.BytesIO()
    Pictures.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def jsonl(folder):
    lines = [json.dumps(row) for row in ROWS]
    lines[7:7] = ["", "   "]
    (folder / "rows.jsonl").write_text("\ufeff" + "\n".join(lines))
    return folder / "rows.jsonl"


def parquet(folder):
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet", row_group_size=70)
    return folder / "rows.parquet"


def parquet_folder(folder):
    for number, start in enumerate(range(0, len(ROWS), 110)):
        table = pa.Table.from_pylist([row | {"embedding": [0.0] * 9} for row in ROWS[start : start + 110]])
        pq.write_table(table, folder / f"train-{number:05}-of-00003.parquet")
    return folder


def saved(folder):
    Dataset.from_list(ROWS).save_to_disk(folder / "saved", num_shards=2)
    return folder / "saved"


@pytest.fixture(
    scope="module", params=[jsonl, parquet, parquet_folder, saved], ids=lambda make: make.__name__
)
def table(request, tmp_path_factory):
    step, numbered.STEP = numbered.STEP, 50
    yield open_rows(str(request.param(tmp_path_factory.mktemp("rows"))))
    numbered.STEP = step


@settings(max_examples=60)
@given(bounds=st.tuples(st.integers(0, 330), st.integers(0, 330)).map(sorted))
@pytest.mark.filterwarnings("ignore")
def test_any_range_of_rows_is_read(table, bounds):
    start, stop = bounds
    if start == stop == 330:
        return
    assert [row for _, row in table.read(start, stop)] == ROWS[start:stop]


def test_rows_are_counted_and_named_as_people_count(table):
    assert len(table) == 330
    (where, row), *_ = table.read(20, 21)
    assert row == ROWS[20] and int(where.rsplit(":")[-1]) in (21, 23)  # blank lines count, too


def test_a_data_set_is_read_by_its_name(tmp_path):
    """A folder is a name for `load_dataset`, too; pictures stay bytes."""
    rows = Dataset.from_list([{"image": {"bytes": png(i), "path": None}, "note": "x"} for i in range(3)])
    (tmp_path / "data").mkdir()
    rows.cast_column("image", Image()).to_parquet(tmp_path / "data/train-00000-of-00001.parquet")
    table = HubRows(str(tmp_path), "train", 3, "")
    assert [row for _, row in table.read(1, 3)] == [
        {"image": {"bytes": png(i), "path": None}} for i in (1, 2)
    ]


@pytest.mark.parametrize(
    "content, message",
    [
        (b'[{"id": 1}]', "a JSON array.*data convert"),
        (b"\x1f\x8b", "compressed"),
        (b"", "no rows in it"),
        (b"  \n\n", "no rows in it"),
        (b'{"id": 1}\n{"id": ', "line 2: not valid JSON"),
        (b'{"id": 1}\n3', "line 2: expected one JSON object"),
        (b'{"id": 1}\n\xff', "line 2: not UTF-8"),
    ],
)
def test_what_is_no_jsonl_is_refused(tmp_path, content, message):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(open_rows(str(tmp_path / "rows.jsonl")).read(0, 2))


@pytest.mark.parametrize("name", ["nobody/nothing-of-the-kind", "absent.jsonl", "absent.parquet"])
def test_what_is_not_there_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=name):
        open_rows(name)


def test_a_damaged_parquet_file_is_named(tmp_path):
    path = parquet(tmp_path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"rows\.parquet: damaged"):
        open_rows(str(path))


@pytest.mark.parametrize("make", [jsonl, parquet, saved])
def test_the_digest_follows_the_rows(make, tmp_path, monkeypatch):
    digests = []
    for number, text in enumerate(["a", "a", "b"]):
        monkeypatch.setattr(f"{__name__}.ROWS", [*ROWS[:200], {"id": "new", "question": text, "image": "x"}])
        (tmp_path / str(number)).mkdir()
        digests.append(open_rows(str(make(tmp_path / str(number)))).digest)
    assert len({digests[0], digests[2]}) == 2 and (make is saved or digests[0] == digests[1])


TALK = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A cup."}]


@pytest.mark.parametrize(
    "raw, expected",
    [
        ({"question": "What?", "objects": ["cup"]}, {"question": "What?", "objects": ["cup"]}),
        ({"question": "Which?", "choices": ["a b", "c"]}, {"question": "Which? Options: (A) a b (B) c"}),
        ({"question": "How far?", "unit": "m"}, {"question": "How far? (Unit: m)"}),
        ({"messages": TALK}, {"question": "<image>\nWhat?"}),
        ({"conversations": [{"from": "human", "value": "What?"}]}, {"question": "What?"}),
        ({"prompt": "What?", "completion": "A cup."}, {"question": "What?"}),
        ({"prompt": TALK[:1], "chosen": TALK[1:], "rejected": TALK[1:]}, {"question": "<image>\nWhat?"}),
    ],
)
def test_what_a_row_asks(raw, expected):
    row = asked_row({"id": "1", "image": "a.png", "split": None} | raw, "f:3")
    assert row["images"] == ["a.png"] and row["id"] == "1" and row.items() >= expected.items()


def test_one_prompt_for_all_needs_nothing_but_a_picture():
    row = asked_row({"image": {"bytes": b"x", "path": None}}, "f.parquet:3", "Describe it.")
    assert row == {"id": "f-3", "images": [{"bytes": b"x"}], "question": "Describe it."}


@pytest.mark.parametrize(
    "raw, message",
    [
        ({"image": "a.png"}, "f:3: none of the fields.*--prompt"),
        ({"question": 3}, "expected text"),
        ({"question": " "}, "is empty"),
        ({"question": "<image> and <image>?", "image": "a.png"}, "2 <image> marks.*1 images"),
        ({"messages": [{"role": "system", "content": "Be brief."}, *TALK], "image": "a"}, "system, user"),
        ({"messages": [*TALK, *TALK], "image": "a"}, None),
        ({"messages": TALK[1:], "image": "a"}, "the turns: none"),
        ({"question": "What?", "objects": b"raw"}, "JSON cannot hold"),
        ({"question": "What?", "box": [0, 1, float("nan"), 2]}, "NaN|finite"),
    ],
)
def test_a_row_that_asks_nothing_usable_is_refused(raw, message):
    if message is None:  # what stands behind the first answer is not asked
        assert asked_row(raw, "f:3")["question"] == TALK[0]["content"]
        return
    with pytest.raises(RowError, match=message):
        asked_row(raw, "f:3")


def test_dates_of_a_parquet_file_become_text(tmp_path):
    import datetime

    pq.write_table(
        pa.Table.from_pylist([{"question": "When?", "answer": datetime.date(2024, 1, 2)}]),
        tmp_path / "a.parquet",
    )
    ((where, raw),) = open_rows(str(tmp_path / "a.parquet")).read(0, 1)
    assert asked_row(raw, where)["answer"] == "2024-01-02"


def test_a_data_set_of_columns_nobody_reads_has_rows_all_the_same(tmp_path):
    Dataset.from_list([{"x": 1}], features=None).cast_column("x", Value("int32")).to_parquet(
        tmp_path / "a.parquet"
    )
    ((where, raw),) = open_rows(str(tmp_path / "a.parquet")).read(0, 1)
    with pytest.raises(RowError, match="nothing is asked"):
        asked_row(raw, where)
