"""Files appear whole or not at all, errors name the place and the cure, and long JSON is read as `json.load` reads it."""

import errno
import gzip
import json
import multiprocessing
import os
import pickle
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from little_room import limit, run_with_little_room
from safetensors.torch import save_file
from tagged_rows import prepared

from vlm_sft_rl import json_stream
from vlm_sft_rl.data.rows import read_raw
from vlm_sft_rl.errors import LONGEST_MESSAGE, RowError, UserError
from vlm_sft_rl.io import (
    is_disk_full,
    new_folder,
    read_json,
    read_jsonl,
    writing,
)
from vlm_sft_rl.json_stream import stream_json_array, stream_json_arrays, stream_json_object


def full(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_recognised_behind_other_errors():
    try:
        try:
            full()
        except OSError as error:
            raise RuntimeError("could not save") from error
    except RuntimeError as error:
        assert is_disk_full(error)
    assert not is_disk_full(RuntimeError("shapes differ"))
    assert not is_disk_full(OSError(errno.ENOENT, "No such file"))


def save_with_little_room(save, folder):
    limit(1000)
    try:
        with writing(folder, "it goes on."):
            save({"a": torch.zeros(100_000)}, str(folder / "weights"))
    except UserError as error:
        text = str(error)
        os._exit(7 if f"{folder}: the disk is full" in text and text.endswith("it goes on.") else 8)
    os._exit(9)


@pytest.mark.parametrize("save", [torch.save, save_file, full])
def test_every_library_s_error_is_one_message(save, tmp_path):
    child = multiprocessing.get_context("fork").Process(target=save_with_little_room, args=(save, tmp_path))
    child.start()
    child.join()
    assert child.exitcode == 7


def test_other_errors_pass():
    with pytest.raises(ValueError, match="something else"), writing("x"):
        raise ValueError("something else")
    with pytest.raises(UserError, match=r"^mine$"), writing("x"):
        raise UserError("mine")


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    for error in (ValueError("not proved"), KeyboardInterrupt()):
        with pytest.raises(type(error)), new_folder(target) as folder:
            (folder / "weights").write_text("1")
            assert not target.exists()
            raise error
        assert list(tmp_path.iterdir()) == []
    (tmp_path / ".model.unfinished").mkdir()
    (tmp_path / ".model.unfinished" / "old").write_text("of a killed run")
    target.mkdir()  # an empty folder is no obstacle
    with new_folder(target) as folder:
        (folder / "weights").write_text("2")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "weights"]
    with pytest.raises(UserError, match="exists already"), new_folder(target) as folder:
        raise AssertionError("not reached")
    assert (target / "weights").read_text() == "2"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "room", "kept"),
    [
        (("pocket", "world", "WORLD"), 1_000, None),
        (("pocket", "world", "WORLD"), 100_000, "images/train/train-00000.png"),
        (("pocket", "build", "WORLD"), 2_000, "build/config.json"),
        (("model", "prepare", "BASE", "WORLD"), 20_000, None),
    ],
)
def test_commands_on_a_full_disk_say_so(tmp_path, words, room, kept):
    places = {"WORLD": tmp_path / "out", "BASE": tmp_path / "base"}
    if "BASE" in words:
        prepared(tmp_path)
    done = run_with_little_room(room, *(str(places.get(word, word)) for word in words))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert re.search(r"Error: .*(the disk is full|File too large).*Free some", done.stderr), done.stderr
    if kept:
        assert (tmp_path / "out" / kept).is_file()


def test_lines_that_are_no_text_or_begin_with_a_mark(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}\n\n{"a": 2}\n')
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (3, {"a": 2})]
    path.write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}')
    assert read_json(path) == {"a": 1}
    for content, message in (
        (b'{"a": 1}\n\xff\xfe\x00\n', r"rows\.jsonl, line 2: not UTF-8"),
        (b"[1]\n", "line 1: expected one JSON object"),
        (b'{"a": 1}\n{"a": \n', r"line 2: not valid JSON .*truncated"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            list(read_jsonl(path))


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=4), v, max_size=3)
)
objects = st.dictionaries(st.text(max_size=4), values, max_size=5)
layouts = st.fixed_dictionaries({"indent": st.sampled_from([None, 1]), "ensure_ascii": st.booleans()})


@pytest.fixture(autouse=True, scope="module", params=[1, 7])
def chunk(request):
    """Bytes that are read at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK", request.param)
        yield


def written(tmp_path_factory, value, **layout):
    path = tmp_path_factory.getbasetemp() / "value.json"
    path.write_text(json.dumps(value, **layout), encoding="utf-8")
    return path


@given(objects, layouts)
def test_object(tmp_path_factory, value, layout):
    assert dict(stream_json_object(written(tmp_path_factory, value, **layout))) == value


@given(st.lists(values, max_size=5), layouts)
def test_array(tmp_path_factory, value, layout):
    path = written(tmp_path_factory, value, **layout)
    assert list(stream_json_array(path)) == list(enumerate(value, 1))


@given(objects, st.lists(values, max_size=4), st.lists(values, max_size=4))
def test_arrays_inside_an_object(tmp_path_factory, others, a, b):
    path = written(tmp_path_factory, {"first a": a, **{f"_{k}": v for k, v in others.items()}, "b": b})
    from_a, from_b = (
        [(key, i, v) for i, v in enumerate(part, 1)] for key, part in (("first a", a), ("b", b))
    )
    assert list(stream_json_arrays(path, {"first a", "b"})) == from_a + from_b
    assert list(stream_json_arrays(path, {"b"})) == from_b


@pytest.mark.parametrize(
    "read, wrap", [(stream_json_object, lambda v: v), (stream_json_array, lambda v: [v])]
)
@given(value=st.dictionaries(st.text(max_size=4), values, min_size=1, max_size=4), data=st.data())
def test_a_truncated_file_is_an_error(tmp_path_factory, read, wrap, value, data):
    path = written(tmp_path_factory, wrap(value), ensure_ascii=False)
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(1, len(content) - 1))])
    with pytest.raises(UserError, match=r"value\.json.*byte \d+.*fetch it again"):
        list(read(path))


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (stream_json_array, '[{"a": "é"}, {"b": 1', "1 complete elements, then nothing valid after byte 14"),
        (stream_json_array, '[{"a":1} {"b":2}]', "expected `,` or `]`"),
        (stream_json_array, '[{"a":1},]', "not valid|too soon"),
        (stream_json_array, '[{"a":}, "a long text"]', "not valid JSON near byte 1, after element 0"),
        (stream_json_array, "[1] x", "text after the end of the array"),
        (stream_json_array, '{"a":1}', "expected a JSON array"),
        (stream_json_array, "[,1, 2, 3, 4, 5]", "not valid JSON"),
        (stream_json_object, "[1]", "expected a JSON object"),
        (stream_json_object, '{"a": 1} x', "text after the end of the object"),
        (stream_json_object, '{"a" 1}', "expected a key and `:`"),
        (stream_json_object, "{1: 2}", "expected a key and `:`"),
        (stream_json_object, '{"a": 1 "b": 2}', "expected `,` or `}`"),
        (stream_json_object, '{"a": nope, "b": "a long text"}', "not valid JSON"),
        (lambda path: stream_json_arrays(path, {"a"}), '{"b": []}', "no `a`"),
        (lambda path: stream_json_arrays(path, {"a"}), '{"a": 3}', "expected an array under `a`"),
    ],
)
def test_broken_files(tmp_path, read, text, message):
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        list(read(tmp_path / "x.json"))


UNUSABLE = [
    ('{"a": "x \\ud83d y"}', "half of a surrogate pair"),
    ('{"a": "\\uDE00"}', "half of a surrogate pair"),
    ('{"a": ' + "9" * 5000 + "}", "thousands of digits"),
    ('{"a": ' * 2000 + "1" + "}" * 2000, "nested deeper"),
    ('{"a": ' * 150 + "1" + "}" * 150, "nested deeper"),
    ('{"a": "tab\there"}', "control character"),
    ('{"a": 1,}', "property name"),
]


@pytest.mark.parametrize(("text", "message"), UNUSABLE, ids=[message for _, message in UNUSABLE])
@pytest.mark.parametrize("read", [read_json, read_jsonl, stream_json_array, stream_json_object])
def test_json_that_nobody_could_use_is_one_message_with_its_place(tmp_path, read, text, message):
    path, whole = tmp_path / "x.json", '{"b": 2}\n'
    contents = {
        read_json: f"[1,\n{text}]",
        read_jsonl: whole + text,
        stream_json_array: f"[{whole}, {text}]",
        stream_json_object: f'{{"b": {whole}, "c": {text}}}',
    }
    path.write_text(contents[read])
    place = "line [12]: " if read in (read_json, read_jsonl) else "after element 1: "
    with pytest.raises(UserError, match=f"(?i)x.json.*{place}.*{message}"):
        list(read(path))


@pytest.mark.parametrize("text", ['["\\ud83d\\ude00"]', '["\\\\ud83d"]', '["\\u0041"]'])
def test_escapes_of_whole_characters_are_read(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    assert [value for _, value in stream_json_array(tmp_path / "x.json")] == json.loads(text)


def test_files_of_another_encoding_or_with_other_line_ends(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes('{"a": 1}\n'.encode("utf-16"))
    with pytest.raises(UserError, match="line 1: not UTF-8"):
        list(read_jsonl(path))
    path.write_bytes(b'{"a": 1}\r\n\r\n{"a": 2}\r\n')
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (3, {"a": 2})]
    path.write_bytes(b'{"a": "\x00"}\n')
    with pytest.raises(UserError, match="line 1: not valid JSON"):
        list(read_jsonl(path))


def test_numbers_of_any_kind_are_read(tmp_path):
    (tmp_path / "x.json").write_text("[18446744073709551617, NaN, 1e400, -0.5e-3]")
    (_, large), (_, nan), (_, infinite), (_, small) = stream_json_array(tmp_path / "x.json")
    assert (large, infinite, small) == (2**64 + 1, float("inf"), -0.0005) and nan != nan


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gzip.compress(b"{}", mtime=0), "gunzip"),
        (b"PK\x03\x04rest", "zip archive"),
        (b"PAR1rest", "data convert --format hf"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"<!DOCTYPE html>", "web page"),
        ("{}".encode("utf-16"), "save it as UTF-8"),
        (b'[{"id": 1},]', "a comma before `]`"),
    ],
)
def test_files_that_are_no_json_are_named(tmp_path, content, words):
    (tmp_path / "rows.json").write_bytes(content)
    with pytest.raises(UserError, match=words):
        list(read_raw(tmp_path / "rows.json"))
    with pytest.raises(UserError, match=words if "comma" not in words else "expected a JSON object"):
        list(stream_json_object(tmp_path / "rows.json"))


@pytest.mark.parametrize(
    "value", ["x" * 5000, ["x"] * 5000, {f"k{i}": i for i in range(5000)}, "it's " * 2000, "`'\"" * 2000]
)
def test_what_a_message_quotes_is_shortened(value):
    text = f"some.yaml: `field` is {value!r}. Expected a number, as in `field: 3`."
    for error in (
        UserError(text),
        RowError("format", text, "f:1"),
        pickle.loads(pickle.dumps(UserError(text))),
    ):
        message = str(error)
        assert len(message) <= LONGEST_MESSAGE + 10
        assert "some.yaml: `field` is " in message and message.endswith("as in `field: 3`.")
    assert len(str(UserError(f"`a` is {'x' * 5000!r}. It isn't a number; see 'b'."))) < 300
    assert str(UserError("it's 'so', isn't it")) == "it's 'so', isn't it"
