"""Ways in which a JSON file can be wrong: cut off, foreign, or with another value somewhere inside."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

DELETE = object()
VALUES = [
    *(None, True, "x", "", "\ud800", "\x1b[2J", -1, 0, 2.5, float("nan"), float("inf"), 10**400),
    *([], {}, ["x"], {"x": 1}, DELETE),
]


def wrong_texts(text: bytes) -> Iterator[tuple[str, bytes]]:
    """The file cut off, damaged, or another one."""
    for share in (0.0, 0.3, 0.9):
        yield f"cut at {share}", text[: int(len(text) * share)]
    yield "without its last character", text.rstrip()[:-1]
    yield "twice", text + text
    yield "no UTF-8", text[:40] + b"\xff\xfe" + text[40:]
    yield "zeros at the end", text + bytes(40)
    for content in (b"[]", b"{}", b"null", b'"text"', b"3\n", b"\x89PNG\r\n", b"[" * 3000, b"a,b\n1,2\n"):
        yield f"{content[:8]!r} instead", content


def wrong_value(value: Any, rng: random.Random) -> tuple[str, str]:
    """A JSON value as text, in which one value is another one or missing."""
    path, new = rng.choice(list(_places(value))), rng.choice(VALUES)
    mutant = copy.deepcopy(value)
    parent = mutant
    for key in path[:-1]:
        parent = parent[key]
    if not path:
        mutant = None if new is DELETE else new
    elif new is DELETE:
        del parent[path[-1]]
    else:
        parent[path[-1]] = new
    name = f"{'.'.join(map(str, path))} = {'(missing)' if new is DELETE else repr(new)[:20]}"
    return name, json.dumps(mutant).replace(str(10**400), "1" * 5000)


def _places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _places(item, (*path, key))


def mutants(content: bytes, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Wrong contents of a JSON or JSONL file, without an end: a wrong text for two wrong values, then these alone."""
    rng = random.Random(seed)
    texts = list(wrong_texts(content))
    rng.shuffle(texts)
    try:
        lines = [json.loads(content)]
    except ValueError:
        lines = [json.loads(line) for line in content.decode().splitlines()]
    while True:
        if texts:
            yield texts.pop()
        for _ in range(2):
            at = rng.randrange(len(lines))
            name, text = wrong_value(lines[at], rng)
            changed = [text if i == at else json.dumps(line) for i, line in enumerate(lines)]
            yield f"line {at + 1}: {name}", "".join(line + "\n" for line in changed).encode()
