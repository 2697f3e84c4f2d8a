"""Rows: the four kinds that every file of data is turned into. Each kind is read by one function; no torch here.

    SFT         {"id": str, "messages": [{"role", "content", "weight"?, "hint"?, "answer_type"?, "supervise"?, "doubts"?}],
                 "images": [...], "source": "file:row"}
    preference  {"id": str, "images", "prompt", "chosen", "rejected", "pair_kind", "pair_weight"}: three lists of messages
    question    {"id": str, "images", "question", "answer"?, "choices"?, "unit"?, "rationale"?, and any ground truth}
    region      {"id": str, "image", "width", "height", "box": xyxy pixels, "expressions"?, ...}

`content` is text in which `<image>` marks the place of an image (one for each entry of `images`; none at all
means "before the first question"). `images` holds paths relative to an image root, PIL images or
`datasets.Image` values. `weight` 0 takes a message out of the loss. `supervise` is "all" (the default),
"text" (no loss on what ends the answer), "verdicts" (loss on the closing verification tags alone) or "correction" (no loss
on stages that the same message writes again). `doubts` says what P(`</UN>`) is taught to be behind each tagged phrase, in
order, in place of the tag that stands there.

A reader takes what means the same elsewhere (`image` or `images`, `from`/`value` or `role`/`content`, typed content,
`system` as the first message, `loss` as `weight`) and refuses what it would have to guess or lose: two fields of one
meaning that differ, pictures under another name, a row of another kind. All who read rows read them here, so a row is
right for all or for nobody.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from ..errors import FORMAT, TAGS, RowError, UserError, short
from ..io import open_file, read_jsonl
from ..json_stream import stream_json_array
from .fields import (
    check_numbers,
    check_unknown,
    identity_of,
    is_number,
    row_images,
    strip_none,
    wrong_field,
)
from .messages import check_order, read_messages, typed_messages
from .tags import TagError, spans

DROPPED_TURN = "leading assistant turn dropped"
BUILT_PAIRS = ("cot", "refine", "select")  # kinds of the preference pairs that self-training builds
# kinds of the pairs of `data pairs`: what lost was doubted by the verifier, was said before, is wrong by ground truth
DOUBT, REPEAT, ERROR = "doubt", "repeat", "error"
IMAGE_PAIR = "image"  # of the pairs of one answer with its picture and with a damaged one
PAIR_KINDS = (*BUILT_PAIRS, "other", DOUBT, REPEAT, ERROR, IMAGE_PAIR)
REGION_FIELDS = ("id", "image", "width", "height", "box")
_NUMBERS = {int, float}
SMALLEST_SIDE = 1.0  # of a box, in pixels; less is a mistake of annotation
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of choices
_LETTER = re.compile(r"[(\[]?([A-Z])[)\]]?[.:]?")
_LETTERED = re.compile(r"\(?([A-Z])[).:]\s+")  # a choice with its letter

SFT, PREFERENCE, QUESTION, REGION = "SFT", "preference", "question", "region"
# the conversation of an SFT row, in one of four shapes
SHAPES = (("conversations",), ("messages",), ("prompt", "completion"), ("question", "answer"))
USED_BY = {
    SFT: "the methods sft, reverse, r3v, rewind and sco",
    PREFERENCE: "the method reflection_dpo",
    QUESTION: "self-training, GRPO and evaluation",
    REGION: "SC-Tune and grounding",
}
SIDES = ("chosen", "rejected")
_TALK = ("messages", "conversations", "completion")
_MARKS = {PREFERENCE: "chosen", QUESTION: "question", REGION: "box"}  # a field of each kind that no other has
_EVERYWHERE = ("id", "question_id", "image", "images", "source")
_TRUTH = (
    "rationale answer_type unit precision category split objects captions instances context domain topic grade "
    "template ques_type ans_type staged box width height expressions"
)
KNOWN = {
    SFT: {*_EVERYWHERE, "conversations", "messages", "prompt", "completion", "system"},
    PREFERENCE: {*_EVERYWHERE, "prompt", *SIDES, "pair_kind", "pair_weight", "system"},
    QUESTION: {*_EVERYWHERE, "question", "answer", "choices", *_TRUTH.split()},
    REGION: {*_EVERYWHERE, *REGION_FIELDS, "expressions", "category", "crowds", "split"},
}

logger = logging.getLogger(__name__)


# --- Files ---


def read_raw(
    path: str | Path | Iterable[tuple[int, dict]], repeated: Counter | None = None
) -> Iterator[tuple[int, dict]]:
    """Yield `(number, object)` from a JSON array (streamed) or from JSONL; the number is element or line.

    Args:
        path: of the file; or what gives such pairs itself (`named.NamedDataset`).
        repeated: counts the keys that an object has twice, see `read_jsonl`.

    Raises UserError: the file cannot be read, is neither, is truncated, or an element is not an object.
    """
    if not isinstance(path, str | Path):
        yield from path
        return
    path = Path(path)
    with open_file(path, "r", encoding="utf-8-sig", errors="replace") as handle:
        while (character := handle.read(1)).isspace():
            pass
    if character != "[":
        yield from read_jsonl(path, repeated)
        return
    for number, raw in stream_json_array(path, repeated):
        if not isinstance(raw, dict):
            raise UserError(f"{path}, row {number}: expected a JSON object, found {type(raw).__name__}.")
        yield number, raw


def read_rows(path: str | Path) -> Iterator[dict]:
    """Yield the rows of a LLaVA, REVERSE, TRL (`messages`, `prompt`/`completion`) or question/answer file.

    Raises RowError: a row has none of the known shapes; file, row and field are named.
    """
    notes: Counter = Counter()
    for number, raw in read_raw(path):
        yield sft_row(raw, f"{path}:{number}", notes)
    for note, count in notes.items():
        logger.warning("%s: %s in %d rows", path, note, count)


def read_pairs(path: str | Path) -> list[dict]:
    """All preference rows of a JSON or JSONL file. Raises UserError: a row is none, or the file is empty."""
    rows = [preference_row(raw, f"{path}:{number}") for number, raw in read_raw(path)]
    if not rows:
        raise UserError(f"{path}: there is no pair in it.")
    return rows


def read_regions(path: str | Path) -> list[dict]:
    """All region rows of a JSON or JSONL file. Raises UserError: a row is none, or the file has no rows."""
    rows = [region_row(raw, f"{path}:{number}") for number, raw in read_raw(path)]
    if not rows:
        raise UserError(f"{path}: no region rows. Write them with `vlm-sft-rl data convert`.")
    return rows


def row_kind(raw: dict) -> str:
    """What a file's row says it is, by the fields that hold its answer.

    A question with its answer is an SFT row as well.
    """
    if raw.get("chosen") is not None or raw.get("rejected") is not None:
        return PREFERENCE
    get = raw.get
    if (
        get("messages") is not None or get("conversations") is not None or get("completion") is not None
    ):  # `_TALK`
        return SFT
    if raw.get("question") is not None:
        return QUESTION
    return REGION if raw.get("box") is not None else SFT


def _shallow(read: Callable) -> Callable:
    """A reader for which a row that is nested too deep to be looked through is a bad row."""

    @wraps(read)
    def reader(raw: dict, where: str = "", *args: Any, **options: Any) -> dict:
        try:
            return read(raw, where, *args, **options)
        except RecursionError as error:
            raise RowError(FORMAT, "lists or objects are nested too deep.", where) from error

    return reader


def _expect(raw: Any, kind: str, where: str) -> None:
    if not isinstance(raw, (dict, Mapping)):  # `Dataset.map` gives rows that are no dicts
        raise RowError(FORMAT, f"expected an object, found {type(raw).__name__}.", where)
    actual = row_kind(raw)
    if actual == SFT and kind != SFT and not any(raw.get(name) is not None for name in _TALK):
        raise RowError(
            FORMAT, f"no field `{_MARKS[kind]}`, so this is no {kind} row, for {USED_BY[kind]}.", where
        )
    if actual != kind and not (kind == SFT and actual == QUESTION):
        raise RowError(
            FORMAT,
            f"this is a {actual} row, for {USED_BY[actual]}; expected a {kind} row, for {USED_BY[kind]}.",
            where,
        )


# --- SFT rows ---


@_shallow
def sft_row(raw: dict, source: str, notes: Counter | None = None) -> dict:
    """Turn one object of any known schema into an SFT row.

    Args:
        raw: the object as read; it is not changed.
        source: `file:row`, used in errors and kept in the row.
        notes: counts what was left out: a leading assistant turn, as the LLaVA code does, and fields that are not known.

    Raises RowError: an unknown shape, role or field value, two shapes at once, or pictures that would be lost.
    """
    _expect(raw, SFT, source)
    images = row_images(raw, source)
    shape = _shape(raw, source)
    if shape[0] == "question":
        question = question_row(raw, source)
        turns = [("question", question_text(question), "user"), ("answer", question["answer"], "assistant")]
    else:
        if not raw.keys() <= KNOWN[SFT]:
            check_unknown(raw, KNOWN[SFT], source, notes, images)
        turns = [(shape[0], raw[shape[0]], None if len(shape) == 1 else "user")]
        turns += [(field, raw[field], "assistant") for field in shape[1:]]
    messages, images = read_messages(raw, turns, images, source, notes)
    first = 1 if messages[0]["role"] == "system" else 0
    if messages[first:] and messages[first]["role"] == "assistant":
        del messages[first]
        if notes is not None:
            notes[DROPPED_TURN] += 1
    check_order(messages, source)
    return {"id": identity_of(raw, source), "messages": messages, "images": images, "source": source}


def _shape(raw: dict, source: str) -> tuple[str, ...]:
    """The fields that hold the conversation. Raises RowError: there are none, or two of them."""
    get = raw.get
    shapes = [s for s in SHAPES if get(s[-1]) is not None and get(s[0]) is not None]
    if len(shapes) > 1:
        shapes = [shape for shape in shapes if all(raw[field] not in ("", []) for field in shape)] or shapes[
            :1
        ]
    if len(shapes) == 1:
        return shapes[0]
    if shapes:
        names = ", ".join(f"`{'` with `'.join(shape)}`" for shape in shapes)
        raise RowError(FORMAT, f"several conversations in one row: {names}. Keep one of them.", source)
    fields = sorted(str(name) for name, value in raw.items() if value is not None)
    raise RowError(
        FORMAT,
        f"unknown row with the fields {short(fields, 300)}. Expected `conversations`, `messages`, "
        "`prompt` and `completion`, or `question` and `answer`. Rename the fields, or let `vlm-sft-rl data convert --format "
        "jsonl --map answer=COLUMN` do it.",
        source,
    )


# --- Preference rows ---


@_shallow
def preference_row(raw: dict, where: str, notes: Counter | None = None) -> dict:
    """The row with texts as message lists and every optional field filled.

    Without `prompt` it is what the messages of `chosen` and `rejected` begin with alike.

    Raises RowError: a field is missing or of the wrong kind, chosen and rejected are equal (but for blanks), one of them
    is no answer to the prompt, or the pictures do not fit their marks.
    """
    _expect(raw, PREFERENCE, where)
    raw = strip_none(dict(raw))
    if fields := [name for name in _TALK if raw.get(name)]:
        raise RowError(FORMAT, f"`{fields[0]}` beside `chosen` and `rejected`. Keep one of them.", where)
    images = row_images(raw, where)
    check_unknown(raw, KNOWN[PREFERENCE], where, notes, images)
    prompt, chosen, rejected = raw.get("prompt"), raw.get("chosen"), raw.get("rejected")
    if prompt is None and isinstance(chosen, list) and isinstance(rejected, list):
        same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
        prompt, chosen, rejected = chosen[:same] or None, chosen[same:], rejected[same:]
    if prompt is None and (names := [name for name in ("question", "instruction", "query") if raw.get(name)]):
        raise RowError(FORMAT, f"no field `prompt`, but `{names[0]}`. Rename it.", where)
    messages, images = read_messages(raw, [("prompt", prompt, "user")], images, where, notes)
    row: dict[str, Any] = {"id": identity_of(raw, where), "images": images, "prompt": _plain(messages)}
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        answers, _ = read_messages({}, [(name, value, "assistant")], [], where, notes)
        if {"assistant"} != {answers[0]["role"], answers[-1]["role"]}:
            raise wrong_field(name, "text, or messages that begin and end with the assistant's", value, where)
        if any(m.get("weight") == 0 for m in answers):
            raise RowError(
                FORMAT, f"field `{name}`: weight 0 in a pair, which compares whole answers.", where
            )
        if any("doubts" in m for m in answers):
            raise RowError(FORMAT, f"field `{name}`: `doubts` belong to SFT rows. Leave them out.", where)
        if odd := {m.get("supervise", "all") for m in answers} - {"all", "text"}:
            words = ", ".join(sorted(odd))
            raise RowError(
                FORMAT, f"field `{name}`: `supervise` is {words}; a pair takes `all` and `text`.", where
            )
        row[name] = _plain(answers)
        conversation = [*messages, *answers]
        check_order(conversation, where)
        typed_messages({"messages": conversation, "images": images, "source": where})
    if same_text(row["chosen"], row["rejected"]):
        raise RowError(FORMAT, "`chosen` and `rejected` are equal, so there is nothing to prefer.", where)
    kind, weight = raw.get("pair_kind", "other"), raw.get("pair_weight", 1.0)
    if kind not in PAIR_KINDS:
        raise RowError(FORMAT, f"`pair_kind` {kind!r} is not one of {', '.join(PAIR_KINDS)}.", where)
    if not is_number(weight) or weight < 0:
        raise RowError(FORMAT, f"`pair_weight` must be a number >= 0, found {short(weight)}.", where)
    return {**row, "pair_kind": kind, "pair_weight": float(weight)}


def _plain(messages: list[dict]) -> list[dict]:
    return [{name: m[name] for name in ("role", "content", "supervise") if name in m} for m in messages]


def same_text(chosen: list[dict], rejected: list[dict]) -> bool:
    """Whether two answers differ in nothing but blanks."""
    return [m["content"].split() for m in chosen] == [m["content"].split() for m in rejected]


def sides(pair: dict) -> Iterator[dict]:
    """The two conversations of a preference row as SFT rows, chosen first; loss is on the answers to its prompt alone."""
    prompt = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in pair["prompt"]]
    for name in SIDES:
        yield {"id": f"{pair['id']}/{name}", "images": pair["images"], "messages": [*prompt, *pair[name]]}


# --- Question rows ---


@_shallow
def question_row(raw: dict, where: str, notes: Counter | None = None) -> dict:
    """The row with `images` as a list, and `id`, `answer` and `rationale` as text where it has them.

    Raises RowError: no question, a row without truth, an answer that is no text or number, choices that are no list of
    texts, an answer that is none of them or two of them, or pictures that do not fit the marks in the question.
    """
    _expect(raw, QUESTION, where)
    row = strip_none(dict(raw))
    row["images"] = row_images(row, where)
    row.pop("image", None)
    check_numbers(row, where)
    check_unknown(row, KNOWN[QUESTION], where, notes, row["images"])
    if raw.get("system") not in (None, ""):
        raise RowError(
            FORMAT, "field `system`: a question has no system turn. Write it as `messages`.", where
        )
    row["id"] = identity_of(row, where)
    for name in ("answer", "rationale", "unit"):
        if is_number(row.get(name)):
            row[name] = str(row[name])
        if name in row and (not isinstance(row[name], str) or not row[name].strip()):
            raise wrong_field(name, "text that is not empty, or a number", row[name], where)
    question, choices, answer = row.get("question"), row.get("choices"), row.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise wrong_field("question", "text", question, where)
    if answer is None and not row.keys() - {*_EVERYWHERE, "question", "choices", "answer_type", "unit"}:
        raise RowError(FORMAT, "a question without `answer` or any other truth.", where)
    if choices is not None:
        _check_choices(choices, answer, where)
    talk = [{"role": "user", "content": question_text(row)}]
    talk += [{"role": "assistant", "content": row[name]} for name in ("answer", "rationale") if name in row]
    typed_messages({"messages": talk, "images": row["images"], "source": where})
    try:
        spans(answer or "")
    except TagError as error:
        raise RowError(TAGS, f"field `answer`: {error}", where) from error
    return row


def _check_choices(choices: Any, answer: str | None, where: str) -> None:
    if (
        not isinstance(choices, list)
        or not 2 <= len(choices) <= len(LETTERS)
        or not all(isinstance(choice, str) and choice.strip() for choice in choices)
    ):
        raise wrong_field("choices", f"two to {len(LETTERS)} texts", choices, where)
    if answer is None:
        return
    texts, letters = option_texts(choices), LETTERS[: len(choices)]
    own = [match[1] for match in map(_LETTERED.match, choices) if match]
    if own != sorted(own) == list(letters):
        raise RowError(
            FORMAT,
            f"field `choices`: their own letters are {', '.join(own)}, and a letter means their order. Sort them.",
            where,
        )
    if answer in letters:
        return
    pairs = zip(letters, choices, texts, strict=True)
    meant = [letter for letter, *forms in pairs if answer in forms]
    if not meant:
        raise RowError(
            FORMAT,
            f"field `answer`: {short(answer)} is neither a letter from A to {letters[-1]} nor one of the choices.",
            where,
        )
    if len(meant) > 1:
        raise RowError(
            FORMAT, f"field `answer`: {short(answer)} means the choices {' and '.join(meant)}.", where
        )


def option_texts(choices: Iterable[str]) -> list[str]:
    """The texts of choices, without the letters of their places that some files write before them: `(A) cup`, and `A. cup`
    where all have one (`A. thaliana` is a text)."""
    texts = list(choices)
    matches = [
        match if (match := _LETTERED.match(text)) and match[1] == LETTERS[i : i + 1] else None
        for i, text in enumerate(texts)
    ]
    have_all = all(matches)
    return [
        (text[match.end() :] if match and (have_all or text[0] == "(") else text).strip()
        for text, match in zip(texts, matches, strict=True)
    ]


def letter_said(text: str, count: int) -> str | None:
    """The letter that a text is, in any of the forms `B`, `(B)` and `B.`, where it is that of one of `count` choices.

    A capital letter means the choice of that letter, also where another choice has this text.
    """
    match = _LETTER.fullmatch(text.strip())
    return match[1] if match and match[1] in LETTERS[:count] else None


def question_parts(question: dict, joint: str = " ") -> list[str]:
    """Question with its unit, and the lettered choices where it has some; `joint` stands between these."""
    text = question["question"].strip()
    if unit := question.get("unit"):
        text += f" (Unit: {unit})"
    if not question.get("choices"):
        return [text]
    options = zip(LETTERS, option_texts(question["choices"]), strict=False)
    return [text, joint.join(["Options:", *(f"({letter}) {option}" for letter, option in options)])]


def question_text(question: dict) -> str:
    """What is asked where nothing else says how: as written, with its unit and choices where it has them."""
    is_bare = not question.get("unit") and not question.get("choices")
    return question["question"] if is_bare else " ".join(question_parts(question))


# --- Region rows: boxes on images, origin at the top left, right and bottom edges exclusive ---


@_shallow
def region_row(
    raw: dict, where: str = "", size: tuple[int, int] | None = None, notes: Counter | None = None
) -> dict:
    """The row with its id as text, its picture as `image` and its box as floats.

    Args:
        size: width and height of the upright image, where it was opened.

    Raises RowError: a field is missing or of the wrong kind, the box is empty or leaves the image, or `size` is another.
    """
    where = where or str(raw.get("id", ""))
    _expect(raw, REGION, where)
    images = row_images(raw, where)
    if not raw.keys() <= KNOWN[REGION]:
        check_unknown(raw, KNOWN[REGION], where, notes, images)
    missing = [f for f in REGION_FIELDS if (not images if f == "image" else raw.get(f) is None)]
    if missing:
        raise RowError(
            FORMAT,
            f"a region row needs the fields {', '.join(REGION_FIELDS)}; {', '.join(missing)} missing. Convert the source "
            "file with `vlm-sft-rl data convert`.",
            where,
        )
    if len(images) > 1:
        raise wrong_field("images", "one image", images, where)
    box = check_box(raw["box"], where)
    check_numbers(raw, where, checked=raw["box"])
    for name in ("width", "height"):
        value = raw[name]
        if not is_number(value) or value <= 0 or value != int(value):
            raise wrong_field(name, "a whole number of pixels", value, where)
    width, height = int(raw["width"]), int(raw["height"])
    if size is not None and (width, height) != size:
        raise RowError(
            FORMAT,
            f"fields `width`, `height`: {width} x {height}, but the image has {size[0]} x {size[1]} pixels. Boxes are in "
            "pixels of the upright image: scale them to it.",
            where,
        )
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise RowError(
            FORMAT,
            f"field `box`: {box} is no [x0, y0, x1, y1] inside an image of {width} x {height} pixels. Convert "
            "with --box-format xywh if these are x, y, width and height.",
            where,
        )
    if below_a_pixel(box):
        shares = " They look like shares of the image: multiply them by its width and height."
        raise RowError(
            FORMAT,
            f"field `box`: {box} is less than a pixel wide or high; boxes are in pixels."
            f"{shares if x1 <= 1 >= y1 else ''}",
            where,
        )
    texts = raw.get("expressions")
    if texts is not None and not (
        isinstance(texts, list) and texts and all(isinstance(text, str) and text.strip() for text in texts)
    ):
        raise wrong_field("expressions", "texts", texts, where)
    if not isinstance(raw.get("category", ""), (str, int, type(None))):
        raise wrong_field("category", "text", raw["category"], where)
    if (crowds := raw.get("crowds")) is not None and (type(crowds) is not int or crowds < 0):
        raise wrong_field("crowds", "a number of boxes", crowds, where)
    row = dict(raw)
    row.pop("images", None)
    row.update(id=identity_of(raw, where), image=images[0], width=width, height=height, box=box)
    return row


def check_box(box: object, where: str, field: str = "box") -> list[float]:
    """Four finite numbers. Raises RowError."""
    if type(box) is list and len(box) == 4 and {*map(type, box)} <= _NUMBERS and sum(map(abs, box)) < 1e9:
        return [*map(float, box)]  # as nearly all are
    if not isinstance(box, (list, Sequence)) or len(box) != 4 or not all(map(is_number, box)):
        raise wrong_field(field, "four numbers", box, where)
    return [float(value) for value in box]


def clip(box: Sequence[float], width: float, height: float) -> list[float] | None:
    """The part of a box inside the image, or None where a side of it is shorter than a pixel."""
    x0, y0, x1, y1 = box
    inside = [max(0.0, x0), max(0.0, y0), min(float(width), x1), min(float(height), y1)]
    return None if below_a_pixel(inside) else inside


def below_a_pixel(box: Sequence[float]) -> bool:
    """Whether a side of the box is shorter than a pixel; sides are taken to two decimals, as boxes are."""
    return round(min(box[2] - box[0], box[3] - box[1]), 2) < SMALLEST_SIDE
