"""Question sets that training reads, too (`data.formats`), and GQA."""

from collections.abc import Iterator

from ...data.sources import questions
from ...data.sources.source import Source, take_text
from ...io import stream_json_object


def tabmwp(source: Source) -> Iterator[dict]:
    """TabMWP `problems_test.json`; see `data.formats`."""
    yield from _with_category(questions.tabmwp(source), "answer_type")


def chartqa(source: Source) -> Iterator[dict]:
    """ChartQA `test_human.json`; see `data.formats`."""
    yield from questions.chartqa(source)


def clevr_math(source: Source) -> Iterator[dict]:
    """CLEVR-Math test questions; see `data.formats`."""
    yield from questions.clevr_math(source)


def geoqa(source: Source) -> Iterator[dict]:
    """GeoQA test questions; see `data.formats`."""
    yield from questions.geoqa(source)


def m3cot(source: Source) -> Iterator[dict]:
    """M3CoT test questions; see `data.formats`."""
    yield from _with_category(questions.m3cot(source), "domain")


def gqa(source: Source) -> Iterator[dict]:
    """`testdev_balanced_questions.json`: id -> `question`, `imageId`, `answer`, `types.structural`."""
    for identity, raw in stream_json_object(source.path):
        where = source.at(identity)
        row = {
            "id": identity,
            "images": [source.image(f"{take_text(raw, 'imageId', where)}.jpg")],
            "question": take_text(raw, "question", where),
            "answer": take_text(raw, "answer", where),
        }
        kind = (raw.get("types") or {}).get("structural")
        yield row | ({"category": kind} if kind else {})


def _with_category(rows: Iterator[dict], field: str) -> Iterator[dict]:
    for row in rows:
        yield row | ({"category": row[field]} if row.get(field) and not row.get("category") else {})
