import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl import io as json_stream
from vlm_sft_rl.data.rows import read_rows, sft_row, strip_none, typed_messages
from vlm_sft_rl.errors import RowError, UserError
from vlm_sft_rl.io import stream_json_array


def turns(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(values)]


def contents(row):
    return [(m["role"], m["content"]) for m in row["messages"]]


def test_the_four_schemas_give_the_same_row():
    expected = [("user", "<image>\nWhat?"), ("assistant", "A cat.")]
    for raw in (
        {"id": 7, "image": "a.png", "conversations": turns("<image>\nWhat?", "A cat.")},
        {
            "id": "7",
            "images": ["a.png"],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
            ],
        },
        {"id": "7", "images": ["a.png"], "prompt": "<image>\nWhat?", "completion": "A cat."},
        {"id": "7", "image": ["a.png"], "question": "<image>\nWhat?", "answer": "A cat."},
    ):
        row = sft_row(raw, "f:1")
        assert contents(row) == expected
        assert (row["id"], row["images"], row["source"]) == ("7", ["a.png"], "f:1")
        assert sft_row(row, row["source"]) == row


def test_the_published_tagged_schema():
    raw = {
        "id": "x",
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is there?"},
            {
                "from": "gpt",
                "value": "<SPAN> A kettle </CN>.",
                "A_type": "general_answer",
                "hint": "a red blender",
            },
            {"from": "human", "value": "Is it on?"},
            {"from": "gpt", "value": "<SPAN> Yes </UN>"},
        ],
    }
    answer = sft_row(raw, "f:1")["messages"][1]
    assert (answer["answer_type"], answer["hint"]) == ("general_answer", "a red blender")


def test_keys_that_arrow_filled_in_are_dropped():
    raw = {
        "id": "1",
        "image": None,
        "images": None,
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi", "image": None}], "weight": None},
            {"role": "assistant", "content": "Hello", "hint": None, "answer_type": None},
        ],
    }
    row = sft_row(raw, "f:1")
    assert row["images"] == [] and row["messages"][1] == {"role": "assistant", "content": "Hello"}
    assert strip_none([{"a": None, "b": [{"c": None}]}]) == [{"b": [{}]}]


def test_leading_assistant_turn_is_dropped_and_counted(tmp_path, caplog):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"conversations": [{"from": "gpt", "value": "Hi"}, *turns("Q", "A")]}]))
    (row,) = read_rows(path)
    assert contents(row) == [("user", "Q"), ("assistant", "A")] and row["id"] == "a-1"
    assert "leading assistant turn dropped in 1 rows" in caplog.text


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"text": "x"}, ["unknown row", "conversations"]),
        ({"conversations": "x"}, ["`conversations`", "list of messages"]),
        ({"conversations": [{"from": "bot", "value": "x"}]}, ["`conversations[0]`", "'bot'"]),
        ({"conversations": [{"from": "human", "value": 3}]}, ["`conversations[0]`", "expected text"]),
        ({"conversations": turns("a", "b"), "image": 5}, ["`image`", "5"]),
        ({"conversations": turns("a", "b"), "image": ""}, ["`image`", "Leave the field out"]),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, ["turn 2", "alternate"]),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b", "weight": 2},
                ]
            },
            ["`messages[1].weight`", "0 or 1"],
        ),
    ],
)
def test_errors_name_the_place_and_the_field(raw, words):
    with pytest.raises(RowError) as caught:
        sft_row(raw, "some.json:12")
    for word in ["some.json:12", *words]:
        assert word in str(caught.value)


def test_placeholders_become_typed_content():
    row = sft_row(
        {"id": "1", "images": ["a", "b"], "question": "See <image> and\n<image>", "answer": "x"}, "f:1"
    )
    assert typed_messages(row)[0]["content"] == [
        {"type": "text", "text": "See "},
        {"type": "image"},
        {"type": "text", "text": " and"},
        {"type": "image"},
    ]
    row["messages"][0]["content"] = "What?"
    assert [p["type"] for p in typed_messages(row)[0]["content"]] == ["image", "image", "text"]


@pytest.mark.parametrize(
    ("question", "answer", "images"),
    [("<image> <image>", "x", ["a"]), ("<image>", "x", []), ("q", "an <image>", ["a"])],
)
def test_placeholder_mismatch(question, answer, images):
    row = sft_row({"id": "1", "images": images, "question": question, "answer": answer}, "f:3")
    with pytest.raises(RowError, match="f:3") as caught:
        typed_messages(row)
    assert caught.value.kind == "placeholder mismatch"


elements = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(
    items=st.lists(st.dictionaries(st.text(max_size=4), elements, max_size=4), max_size=6),
    chunk=st.integers(1, 40),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 1]),
)
def test_streaming_equals_json_loads(tmp_path_factory, items, chunk, ascii_only, indent):
    path = tmp_path_factory.mktemp("s") / "a.json"
    path.write_text(json.dumps(items, ensure_ascii=ascii_only, indent=indent), encoding="utf-8")
    old, json_stream.CHUNK = json_stream.CHUNK, chunk
    try:
        assert list(stream_json_array(path)) == list(enumerate(items, 1))
    finally:
        json_stream.CHUNK = old


@pytest.mark.parametrize("cut", [1, 10, 40, 75, -1, -2])
def test_truncated_array(tmp_path, cut):
    path = tmp_path / "a.json"
    whole = json.dumps(
        [{"id": i, "conversations": turns("é <image>", "y")} for i in range(20)], ensure_ascii=False
    )
    path.write_bytes(whole.encode()[:cut])
    with pytest.raises(UserError, match=r"byte \d+.*fetch it again") as caught:
        list(stream_json_array(path))
    assert str(path) in str(caught.value)


def test_truncation_is_located_after_the_last_complete_element(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"a": "é"}, {"b": 1')
    with pytest.raises(UserError, match="1 complete elements, then nothing valid after byte 14"):
        list(stream_json_array(path))


@pytest.mark.parametrize("text", ['[{"a":1} {"b":2}]', '[{"a":1},]', '[{"a":}]', "[1] x", '{"a":1}', "[,1]"])
def test_malformed_array(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError):
        list(stream_json_array(path))


def test_elements_that_are_not_objects(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[[1]]")
    with pytest.raises(UserError, match="row 1: expected a JSON object"):
        list(read_rows(path))


def test_rows_and_tags_do_not_import_torch():
    code = "import sys, vlm_sft_rl.data.rows, vlm_sft_rl.data.tags; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
