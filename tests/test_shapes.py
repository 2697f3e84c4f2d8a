"""Shapes of JSON values: what fits, and where a value departs from one."""

import json
import re

import pytest

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.shapes import AMOUNT, COUNT, NUMBER, SHARE, Kinds, Map, fault, read_lines, read_object

SPAN = {"text": str, "p": SHARE, "note?": (str, None)}
EVENT = Kinds("kind", {"say": {"text": str}, "count": {"n": COUNT}})


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        ("", str),
        (1, NUMBER),
        (1.0000001, SHARE),  # a probability is rounded
        (None, (str, None)),
        ([], [str]),
        ([1, 2.5], [NUMBER, NUMBER]),
        ({"text": "a", "p": 0.5, "more": [1]}, SPAN),
        ({"kind": "count", "n": 3}, EVENT),
        ({"a": {"text": "x", "p": 0}}, Map(SPAN)),
    ],
)
def test_what_fits(value, shape):
    assert fault(value, shape) is None


@pytest.mark.parametrize(
    ("value", "shape", "message"),
    [
        (3, str, "expected text, found 3"),
        ("\ud800", str, "expected text"),
        (True, COUNT, "expected a whole number of at least 0, found True"),
        (-1, COUNT, "expected a whole number of at least 0, found -1"),
        (1.5, COUNT, "expected a whole number"),
        (float("nan"), AMOUNT, "expected a number of at least 0, found nan"),
        (float("inf"), NUMBER, "expected a number, found inf"),
        (10**400, NUMBER, "expected a number"),
        (1.1, SHARE, "expected a number from 0 to 1, found 1.1"),
        ("x", bool, "expected true or false"),
        (3, (str, None), "expected text or null, found 3"),
        ({}, [str], "expected a list, found {}"),
        (["a", 1], [str], r"field `\[1\]`: expected text, found 1"),
        ([1, 2, 3], [NUMBER, NUMBER], "expected a list of 2"),
        ([], SPAN, r"expected an object, found \[\]"),
        ({"text": "a"}, SPAN, "the field `p` is missing"),
        ({"text": "a", "p": None}, SPAN, "field `p`: expected a number from 0 to 1, found None"),
        ({"text": "a", "p": 0, "note": 1}, SPAN, "field `note`: expected text or null"),
        ({"a": {"text": 1, "p": 0}}, Map(SPAN), "field `a.text`: expected text"),
        ([{"p": 0}], ([SPAN], None), r"the field `\[0\].text` is missing"),
        ({"kind": "sing"}, EVENT, "field `kind`: expected one of say, count, found 'sing'"),
        ({"kind": "say"}, EVENT, "the field `text` is missing"),
    ],
)
def test_where_a_value_departs(value, shape, message):

    assert re.match(message, fault(value, shape))


def test_files_are_named_with_line_field_and_cure(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"id": name}) + "\n" for name in ("a", "b", "a")))
    with pytest.raises(UserError, match=r"a\.jsonl, line 3: the id 'a' is already on line 1"):
        list(read_lines(path, {"id": str}, "", "id"))
    path.write_text('{"id": 3}\n')
    with pytest.raises(UserError, match=r"line 1: field `id`: expected text, found 3\. Write it anew\."):
        list(read_lines(path, {"id": str}, "Write it anew."))
    with pytest.raises(UserError, match=r"a\.jsonl: field `id`: .* Write it anew\."):
        read_object(path, {"id": str}, "Write it anew.")
