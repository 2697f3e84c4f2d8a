"""Question answering sets -> question rows: `{"id", "images", "question", "answer", "answer_type", …}`.

`answer_type` is "choice" (then `answer` is the letter and `choices` the texts), "number", "yes_no" or "text".
A published solution is kept as `rationale`. Questions are left as they are: options, units and instructions are put
into the prompt by whoever asks.
"""

import re
from collections.abc import Iterator

from ...errors import short
from ...json_stream import stream_json_array
from ..rows import LETTERS, question_row, wrong_field
from .source import Record, Source, members, objects

_NUMBER = re.compile(r"[-+−]?[$€£]?\s*(\d{1,3}(,\d{3})+|\d+)?(\.\d+)?\s*%?")
_KEPT = [
    "context",
    "domain",
    "topic",
    "category",
    "split",
    "grade",
    "unit",
    "ques_type",
    "ans_type",
    "template",
]


def tabmwp(source: Source) -> Iterator[dict]:
    """TabMWP `problems_*.json`: `{pid: {"question", "choices", "answer", "unit", "solution", …}}`; `tables/<pid>.png`."""
    for r in members(source):
        answer, row = r.text("answer"), _row(r, r.key, "tables", f"{r.key}.png")
        if r.raw.get("choices") not in (None, []):
            choices = [text.strip() for text in r.texts("choices")]
            if answer not in choices[: len(LETTERS)]:
                raise r.wrong(
                    f"field `answer`: {short(answer)} is none of the choices {short(choices, 200)}."
                )
            row |= _choice(choices, LETTERS[choices.index(answer)])
        else:
            kind = "number" if r.raw.get("ans_type") in ("integer_number", "decimal_number") else "text"
            row |= {"answer": answer, "answer_type": kind}
        yield question_row(row, r.where)


def chartqa(source: Source) -> Iterator[dict]:
    """ChartQA `*_human.json`: `[{"imgname", "query", "label"}]`; images in `png/` beside the file."""
    for r in objects(source):
        name, answer = r.text("imgname"), r.text("label")
        row = _row(r, r.number, "png", name, question="query")
        yield question_row(row | {"answer": answer, "answer_type": answer_type(answer)}, r.where)


def clevr_math(source: Source) -> Iterator[dict]:
    """CLEVR-Math: `[{"filename", "question", "answer"}]`; images in `clevr_math_imgs/`."""
    for r in objects(source):
        answer = r.text("answer")
        if not answer.removeprefix("-").isdecimal():
            raise wrong_field("answer", "a whole number", answer, r.where)
        row = _row(r, r.number, "clevr_math_imgs", r.text("filename"))
        yield question_row(row | {"answer": answer, "answer_type": "number"}, r.where)


def geoqa(source: Source) -> Iterator[dict]:
    """GeoQA: `{"id", "image"?, "question", "choices", "answer": letter}`; `images/<id>.png`."""
    return (_with_letter(r) for r in objects(source))


def m3cot(source: Source) -> Iterator[dict]:
    """M3CoT: `{"id", "image"?, "question", "choices", "context", "answer": letter, "rationale", "domain", "topic"}`.

    Rows without an image are kept as questions of text alone when `image_id` is empty too.
    """
    for r in objects(source):
        row = _with_letter(r)
        if r.raw.get("image") is None and r.raw.get("image_id") in (None, ""):
            row["images"] = []
            source.notes["questions without an image"] += 1
        yield row


def easy_vqa(source: Source) -> Iterator[dict]:
    """easy-vqa `questions.json`: `[[question, answer, number of the image], …]`; `images/<number>.png` beside the file."""
    columns = ("question", "answer", "image")
    for number, raw in stream_json_array(source.path):
        r = Record(source, number, raw)
        if not isinstance(raw, list) or len(raw) != len(columns):
            raise r.wrong(f"expected [question, answer, number of the image], found {short(raw)}.")
        r = r._replace(raw=dict(zip(columns, raw, strict=True)))
        answer = r.text("answer")
        row = _row(r, r.number, "images", f"{r.take('image', int)}.png")
        yield question_row(row | {"answer": answer, "answer_type": answer_type(answer)}, r.where)


def answer_type(answer: str) -> str:
    """ "number", "yes_no" or "text", by the look of a gold answer."""
    text = answer.strip().lower()
    if text in ("yes", "no"):
        return "yes_no"
    return "number" if any(c.isdigit() for c in text) and _NUMBER.fullmatch(text) else "text"


def _row(r: Record, identity: str, *image: str, question: str = "question") -> dict:
    """The row without its answer; `image` are the parts of its picture's path."""
    row = {"id": str(identity), "images": [r.source.image(*image)], "question": r.text(question)}
    row |= {name: r.raw[name] for name in _KEPT if r.raw.get(name) not in (None, "")}
    solution = next((name for name in ("rationale", "solution") if r.raw.get(name) not in (None, "")), None)
    return row | ({"rationale": r.text(solution)} if solution else {})


def _with_letter(r: Record) -> dict:
    """A row whose answer is a letter; its image is the named one, below `images/` unless it says where, or `<id>.png`."""
    identity, name = r.text("id"), r.raw.get("image")
    if not isinstance(name, str) or not name.strip():
        name = f"{identity}.png"
    row = _row(r, identity, *([name] if "/" in name else ["images", name]))
    choices = [text.strip() for text in r.texts("choices")]
    return question_row(row | _choice(choices, r.letter(choices)), r.where)


def _choice(choices: list[str], letter: str) -> dict:
    return {"choices": choices, "answer": letter, "answer_type": "choice"}
