"""Streamed reading equals `json.load`, wherever the chunks end."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl import io as json_stream
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.io import stream_json_array, stream_json_arrays, stream_json_object

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=4), v, max_size=3)
)
objects = st.dictionaries(st.text(max_size=4), values, max_size=5)


@pytest.fixture(autouse=True, scope="module")
def small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK", 3)
        yield


def written(tmp_path_factory, value, indent):
    path = tmp_path_factory.getbasetemp() / "value.json"
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False), encoding="utf-8")
    return path


@given(objects, st.sampled_from([None, 1]))
def test_object(tmp_path_factory, value, indent):
    assert dict(stream_json_object(written(tmp_path_factory, value, indent))) == value


@given(st.lists(values, max_size=5), st.sampled_from([None, 1]))
def test_array(tmp_path_factory, value, indent):
    found = list(stream_json_array(written(tmp_path_factory, value, indent)))
    assert found == list(enumerate(value, 1))


@given(objects, st.lists(values, max_size=4), st.lists(values, max_size=4))
def test_arrays_inside_an_object(tmp_path_factory, others, a, b):
    value = {"first a": a, **{f"_{key}": item for key, item in others.items()}, "b": b}
    path = written(tmp_path_factory, value, None)
    found = list(stream_json_arrays(path, {"first a", "b"}))
    assert found == [("first a", i, v) for i, v in enumerate(a, 1)] + [
        ("b", i, v) for i, v in enumerate(b, 1)
    ]
    assert list(stream_json_arrays(path, {"b"})) == [("b", i, v) for i, v in enumerate(b, 1)]


@given(st.dictionaries(st.text(max_size=4), values, min_size=1, max_size=4), st.data())
def test_a_truncated_file_is_an_error(tmp_path_factory, value, data):
    path = written(tmp_path_factory, value, None)
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: data.draw(st.integers(1, len(text) - 1))], encoding="utf-8")
    with pytest.raises(UserError, match=r"value\.json"):
        list(stream_json_object(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "expected a JSON object"),
        ('{"a": 1} x', "text after the end of the object"),
        ('{"a" 1}', "expected a key and `:`"),
        ('{1: 2}', "expected a key and `:`"),
        ('{"a": 1 "b": 2}', "expected `,` or `}`"),
        ('{"a": nope, "b": "a long text"}', "not valid JSON"),
    ],
)  # fmt: skip
def test_broken_objects(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=message):
        list(stream_json_object(tmp_path / "x.json"))


@pytest.mark.parametrize(
    ("text", "message"), [('{"b": []}', "no `a`"), ('{"a": 3}', "expected an array under `a`")]
)
def test_missing_arrays(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=message):
        list(stream_json_arrays(tmp_path / "x.json", {"a"}))
