"""Question answering sets -> question rows: `{"id", "images", "question", "answer", "answer_type", …}`.

`answer_type` is "choice" (then `answer` is the letter and `choices` the texts), "number", "yes_no" or "text".
A published solution is kept as `rationale`. Questions are left as they are: options, units and instructions are put
into the prompt by whoever asks.
"""

import re
from collections.abc import Iterator

from ...errors import FORMAT, RowError
from ...io import stream_json_object
from ..rows import read_raw
from .source import Source, take, take_text

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NUMBER = re.compile(r"[-+−]?[$€£]?\s*(\d{1,3}(,\d{3})+|\d+)?(\.\d+)?\s*%?")
_KEPT = (
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
)


def tabmwp(source: Source) -> Iterator[dict]:
    """TabMWP `problems_*.json`: `{pid: {"question", "choices", "answer", "unit", "solution", …}}`; `tables/<pid>.png`."""
    for pid, raw in stream_json_object(source.path):
        where = source.at(pid)
        answer = take_text(raw, "answer", where)
        row = _row(source, raw, where, pid, "tables", f"{pid}.png")
        if choices := [str(choice).strip() for choice in raw.get("choices") or []]:
            if answer not in choices:
                raise RowError(
                    FORMAT, f"field `answer`: {answer!r:.80} is none of the choices {choices}.", where
                )
            yield row | _choice(choices, LETTERS[choices.index(answer)], where)
        else:
            kind = "number" if raw.get("ans_type") in ("integer_number", "decimal_number") else "text"
            yield row | {"answer": answer, "answer_type": kind}


def chartqa(source: Source) -> Iterator[dict]:
    """ChartQA `*_human.json`: `[{"imgname", "query", "label"}]`; images in `png/` beside the file."""
    for number, raw in read_raw(source.path):
        where = source.at(number)
        name, answer = take_text(raw, "imgname", where), take_text(raw, "label", where)
        row = _row(source, raw, where, f"{source.path.stem}-{number}", "png", name, question="query")
        yield row | {"answer": answer, "answer_type": answer_type(answer)}


def clevr_math(source: Source) -> Iterator[dict]:
    """CLEVR-Math: `[{"filename", "question", "answer"}]`; images in `clevr_math_imgs/`."""
    for number, raw in read_raw(source.path):
        where = source.at(number)
        answer, name = take_text(raw, "answer", where), take_text(raw, "filename", where)
        if not answer.removeprefix("-").isdigit():
            raise RowError(FORMAT, f"field `answer`: expected a whole number, found {answer!r:.80}.", where)
        row = _row(source, raw, where, f"{source.path.stem}-{number}", "clevr_math_imgs", name)
        yield row | {"answer": answer, "answer_type": "number"}


def geoqa(source: Source) -> Iterator[dict]:
    """GeoQA: `{"id", "image"?, "question", "choices", "answer": letter}`; `images/<id>.png`."""
    for number, raw in read_raw(source.path):
        yield _with_letter(source, raw, source.at(number))


def m3cot(source: Source) -> Iterator[dict]:
    """M3CoT: `{"id", "image"?, "question", "choices", "context", "answer": letter, "rationale", "domain", "topic"}`.

    Rows without an image are kept as questions of text alone when `image_id` is empty too.
    """
    for number, raw in read_raw(source.path):
        row = _with_letter(source, raw, source.at(number))
        if raw.get("image") is None and raw.get("image_id") in (None, ""):
            row["images"] = []
            source.notes["questions without an image"] += 1
        yield row


def answer_type(answer: str) -> str:
    """ "number", "yes_no" or "text", by the look of a gold answer."""
    text = answer.strip().lower()
    if text in ("yes", "no"):
        return "yes_no"
    return "number" if any(c.isdigit() for c in text) and _NUMBER.fullmatch(text) else "text"


def _row(
    source: Source, raw: dict, where: str, identity: str, *image: str, question: str = "question"
) -> dict:
    """The row without its answer; `image` are the parts of its picture's path."""
    row = {
        "id": str(identity),
        "images": [source.image(*image)],
        "question": take_text(raw, question, where),
    }
    row |= {name: raw[name] for name in _KEPT if raw.get(name) not in (None, "")}
    if rationale := raw.get("rationale") or raw.get("solution"):
        row["rationale"] = str(rationale).strip()
    return row


def _with_letter(source: Source, raw: dict, where: str) -> dict:
    """A row whose answer is a letter; its image is the named one, below `images/` unless it says where, or `<id>.png`."""
    identity, name = take_text(raw, "id", where), raw.get("image")
    if not isinstance(name, str) or not name.strip():
        name = f"{identity}.png"
    row = _row(source, raw, where, identity, *([name] if "/" in name else ["images", name]))
    choices = [str(choice).strip() for choice in take(raw, "choices", list, where)]
    return row | _choice(choices, take_text(raw, "answer", where), where)


def _choice(choices: list[str], letter: str, where: str) -> dict:
    letter = letter.strip("(). ").upper()
    if len(letter) != 1 or letter not in LETTERS[: len(choices)]:
        raise RowError(
            FORMAT,
            f"field `answer`: expected a letter from A to {LETTERS[max(0, len(choices) - 1)]}, found {letter!r:.80}.",
            where,
        )
    return {"choices": choices, "answer": letter, "answer_type": "choice"}
