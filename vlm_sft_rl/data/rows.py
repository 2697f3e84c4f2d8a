"""Rows: the four kinds that every file of data is turned into. Each kind is read by one function; no torch here.

    SFT         {"id": str, "messages": [{"role", "content", "weight"?, "hint"?, "answer_type"?, "supervise"?}],
                 "images": [...], "source": "file:row"}
    preference  {"id": str, "images", "prompt", "chosen", "rejected", "pair_kind", "pair_weight"}: three lists of messages
    question    {"id"?, "images", "question", "answer"?, "choices"?, ...}
    region      {"id": str, "image", "width", "height", "box": xyxy pixels, "expressions"?, ...}

`content` is text in which `<image>` marks the place of an image (one for each entry of `images`; none at all
means "before the first question"). `images` holds paths relative to an image root, PIL images or
`datasets.Image` values. `weight` 0 takes a message out of the loss. `supervise` is "all" (the default),
"verdicts" (loss on the closing verification tags alone) or "correction" (no loss on stages that the same message
writes again).
"""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import FORMAT, PLACEHOLDER, RowError, UserError
from ..io import open_file, read_jsonl, stream_json_array
from .tags import CONFIDENT, UNCONFIDENT

IMAGE = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
DROPPED_TURN = "leading assistant turn dropped"
SUPERVISE = ("all", "verdicts", "correction")
TRAINING = ("messages", "conversations", "completion", "chosen")  # fields of rows that hold their answers
BUILT_PAIRS = ("cot", "refine", "select")  # kinds of the preference pairs that self-training builds
PAIR_KINDS = (*BUILT_PAIRS, "other")
REGION_FIELDS = ("id", "image", "width", "height", "box")
ROWS_LOOKED_AT = 2000  # for the share of rows with tags
SMALLEST_SIDE = 1.0  # of a box, in pixels; less is a mistake of annotation

logger = logging.getLogger(__name__)


# --- Files ---


def read_raw(path: str | Path) -> Iterator[tuple[int, dict]]:
    """Yield `(number, object)` from a JSON array (streamed) or from JSONL; the number is element or line.

    Raises UserError: the file cannot be read, is neither, is truncated, or an element is not an object.
    """
    path = Path(path)
    with open_file(path, "r", encoding="utf-8-sig", errors="replace") as handle:
        while (character := handle.read(1)).isspace():
            pass
    if character != "[":
        yield from read_jsonl(path)
        return
    for number, raw in stream_json_array(path):
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
    rows = [preference_row(raw, f"{path}, row {number}") for number, raw in read_raw(path)]
    if not rows:
        raise UserError(f"{path}: there is no pair in it.")
    return rows


def read_regions(path: str | Path) -> list[dict]:
    """All region rows of a JSONL file. Raises UserError: a row is none, or the file has no rows."""
    rows = [region_row(raw, f"{path}:{number}") for number, raw in read_jsonl(path)]
    if not rows:
        raise UserError(f"{path}: no region rows. Write them with `vlm-sft-rl data convert`.")
    return rows


def row_kind(raw: dict) -> str:
    """What a file's row says it is: "region", "question", else "sft"."""
    if any(raw.get(name) is not None for name in TRAINING):
        return "sft"
    if raw.get("box") is not None:
        return "region"
    return "question" if raw.get("question") is not None else "sft"


def strip_none(value: Any) -> Any:
    """Remove keys whose value is None, at every depth: Arrow adds them for fields that other rows have."""
    if isinstance(value, dict):
        return {key: strip_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [strip_none(item) for item in value]
    return value


def wrong_field(field: str, expected: str, value: Any, where: str) -> RowError:
    """The error of a field that holds something else than was expected."""
    return RowError(FORMAT, f"field `{field}`: expected {expected}, found {value!r:.80}.", where)


# --- SFT rows ---


def sft_row(raw: dict, source: str, notes: Counter | None = None) -> dict:
    """Turn one object of any known schema into an SFT row.

    Args:
        raw: the object as read; it is not changed.
        source: `file:row`, used in errors and kept in the row.
        notes: counts what was left out (a leading assistant turn, as the LLaVA code does).

    Raises RowError: an unknown shape, role or field value.
    """
    images = _images(raw, source)
    if raw.get("conversations") is not None:
        messages = _messages(raw["conversations"], "conversations", source, images)
    elif raw.get("messages") is not None:
        messages = _messages(raw["messages"], "messages", source, images)
    elif raw.get("prompt") is not None and raw.get("completion") is not None:
        prompt, completion = (
            [{"role": role, "content": raw[field]}] if isinstance(raw[field], str) else raw[field]
            for field, role in (("prompt", "user"), ("completion", "assistant"))
        )
        messages = _messages(prompt, "prompt", source, images)
        messages += _messages(completion, "completion", source, [])
    elif raw.get("question") is not None and raw.get("answer") is not None:
        question = question_row(raw, source)
        messages = [
            {"role": "user", "content": question["question"]},
            {"role": "assistant", "content": question["answer"]},
        ]
    else:
        fields = sorted(name for name, value in raw.items() if value is not None)
        raise RowError(
            FORMAT,
            f"unknown row with the fields {fields}. Expected `conversations`, `messages`, "
            "`prompt` and `completion`, or `question` and `answer`.",
            source,
        )
    body = [m for m in messages if m["role"] != "system"]
    if body and body[0]["role"] == "assistant":
        messages.remove(body.pop(0))
        if notes is not None:
            notes[DROPPED_TURN] += 1
    _check_order(messages, body, source)
    identity = _either(raw, "id", "question_id")
    if identity is None:
        path, _, number = source.rpartition(":")
        identity = f"{Path(path or source).stem}-{number}"
    return {"id": str(identity), "messages": messages, "images": images, "source": source}


def _either(raw: dict, name: str, other: str) -> Any:
    value = raw.get(name)
    return raw.get(other) if value is None else value


def _images(raw: dict, source: str) -> list:
    field = "image" if raw.get("images") is None else "images"
    value = raw.get(field)
    items = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
    images = []
    for image in items:
        if isinstance(image, dict):
            image = {name: part for name, part in image.items() if part is not None}
        is_picture = hasattr(image, "convert")  # PIL, without importing it
        is_encoded = isinstance(image, dict) and ("bytes" in image or "path" in image)
        if not (is_picture or is_encoded or (isinstance(image, str) and image.strip())):
            raise RowError(
                FORMAT,
                f"field `{field}`: expected a path, a list of paths, or nothing; found {image!r:.80}. Leave "
                "the field out of text-only rows.",
                source,
            )
        images.append(image)
    return images


def _messages(turns: Any, field: str, source: str, images: list) -> list[dict]:
    if not isinstance(turns, list) or not turns:
        raise wrong_field(field, "a list of messages", turns, source)
    return [_message(turn, f"{field}[{i}]", source, images) for i, turn in enumerate(turns)]


def _message(turn: Any, field: str, source: str, images: list) -> dict:
    if not isinstance(turn, dict):
        raise wrong_field(field, "an object", turn, source)
    speaker, content = _either(turn, "from", "role"), _either(turn, "value", "content")
    role = ROLES.get(speaker)
    if role is None:
        raise RowError(FORMAT, f"field `{field}`: role {speaker!r} is not one of {sorted(ROLES)}.", source)
    if isinstance(content, list):
        content = _join_parts(content, field, source, images)
    if not isinstance(content, str):
        raise wrong_field(field, "text", content, source)
    message = {"role": role, "content": content}
    if (weight := turn.get("weight")) is not None:
        if weight not in (0, 1):
            raise wrong_field(f"{field}.weight", "0 or 1", weight, source)
        message["weight"] = int(weight)
    if (supervise := turn.get("supervise")) is not None:
        if supervise not in SUPERVISE:
            raise wrong_field(f"{field}.supervise", f"one of {', '.join(SUPERVISE)}", supervise, source)
        message["supervise"] = supervise
    if (hint := turn.get("hint")) is not None:
        message["hint"] = ", ".join(map(str, hint)) if isinstance(hint, list) else str(hint)
    if (kind := _either(turn, "answer_type", "A_type")) is not None:
        message["answer_type"] = str(kind)
    return message


def _join_parts(parts: list, field: str, source: str, images: list) -> str:
    """Typed content -> text with placeholders; images that the parts carry are appended to `images`."""
    text, last = "", len(parts) - 1
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind == "image":
            names = (name for name in ("image", "path", "url") if part.get(name) is not None)
            if (name := next(names, None)) is not None:
                images.append(strip_none(part[name]))
            text += f"\n{IMAGE}" if i == last and text else f"{IMAGE}\n" if i < last else IMAGE
        else:
            raise RowError(FORMAT, f"field `{field}`: unknown content part {part!r:.80}.", source)
    return text


def _check_order(messages: list[dict], body: list[dict], source: str) -> None:
    if any(m["role"] == "system" for m in messages[1:]):
        raise RowError(FORMAT, "a system message may only come first.", source)
    for i, message in enumerate(body):
        expected = "assistant" if i % 2 else "user"
        if message["role"] != expected:
            raise RowError(
                FORMAT,
                f"turn {i + 1} is by the {message['role']}, expected the {expected}: turns must alternate, "
                "beginning with the user. Merge neighbouring messages of one speaker.",
                source,
            )


def typed_messages(row: dict) -> list[dict]:
    """The messages of an SFT row in the typed form that chat templates take: `content` = image and text parts.

    The one line break that sets a placeholder off from the text (`<image>\\nWhat is this?`) goes away with
    it: the templates write their own.

    Raises RowError: the placeholders do not match the images, or stand outside of user messages.
    """
    where, count = row.get("source") or row.get("id", ""), len(row.get("images") or [])
    texts = [message["content"] for message in row["messages"]]
    for i, message in enumerate(row["messages"]):
        if message["role"] != "user" and IMAGE in texts[i]:
            raise RowError(
                PLACEHOLDER,
                f"{IMAGE} in message {i + 1} ({message['role']}): images belong to user messages. "
                "Remove it there, or write the word differently.",
                where,
            )
    marks = sum(text.count(IMAGE) for text in texts)
    if not marks and count:
        first = next((i for i, m in enumerate(row["messages"]) if m["role"] == "user"), None)
        if first is None:
            raise RowError(PLACEHOLDER, "images but no user message to show them in. Add a question.", where)
        texts[first] = f"{IMAGE}\n" * count + texts[first]
    elif marks != count:
        raise RowError(
            PLACEHOLDER,
            f"{marks} {IMAGE} placeholders but {count} images. Write one placeholder for each image, or "
            "none to put the images before the first question.",
            where,
        )
    return [
        {"role": m["role"], "content": _parts(text)} for m, text in zip(row["messages"], texts, strict=True)
    ]


def _parts(text: str) -> list[dict]:
    pieces = text.split(IMAGE)
    parts: list[dict] = []
    for i, piece in enumerate(pieces):
        if i:
            parts.append({"type": "image"})
            piece = piece.removeprefix("\n")
        if i == len(pieces) - 2 and not pieces[-1].strip():
            piece = piece.removesuffix("\n")
        if piece or len(pieces) == 1:
            parts.append({"type": "text", "text": piece})
    return parts


# --- Preference rows ---


def preference_row(raw: dict, where: str) -> dict:
    """The row with texts as message lists and every optional field filled.

    Raises RowError: a field is missing or of the wrong kind, or chosen and rejected are equal.
    """
    raw = strip_none(raw)
    row: dict[str, Any] = {"id": str(raw.get("id", where)), "images": list(raw.get("images") or [])}
    for name, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
        value = raw.get(name)
        messages = [{"role": role, "content": value}] if isinstance(value, str) else value
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise wrong_field(name, "text or messages", value, where)
        row[name] = [{"role": m.get("role", role), "content": m.get("content")} for m in messages]
    if row["chosen"] == row["rejected"]:
        raise RowError(FORMAT, "`chosen` and `rejected` are equal, so there is nothing to prefer.", where)
    kind, weight = raw.get("pair_kind", "other"), raw.get("pair_weight", 1.0)
    if kind not in PAIR_KINDS:
        raise RowError(FORMAT, f"`pair_kind` {kind!r} is not one of {', '.join(PAIR_KINDS)}.", where)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight < 0:
        raise RowError(FORMAT, f"`pair_weight` must be a number >= 0, found {weight!r}.", where)
    return {**row, "pair_kind": kind, "pair_weight": float(weight)}


# --- Question rows ---


def question_row(raw: dict, where: str) -> dict:
    """The row with `images` as a list, and `id`, `answer` and `rationale` as text where it has them.

    Raises RowError: no question, an answer that is no text or number, choices that are no list of texts, or an answer
    that is none of them.
    """
    row = strip_none(raw)
    row["images"] = _images(row, where)
    row.pop("image", None)
    for name in ("id", "answer", "rationale"):
        if isinstance(row.get(name), int | float) and not isinstance(row[name], bool):
            row[name] = str(row[name])
    question, choices, answer = row.get("question"), row.get("choices"), row.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise wrong_field("question", "text", question, where)
    if answer is not None and not isinstance(answer, str):
        raise wrong_field("answer", "text", answer, where)
    if choices is None:
        return row
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) for c in choices):
        raise wrong_field("choices", "two texts or more", choices, where)
    letters = [chr(ord("A") + i) for i in range(len(choices))]
    if answer is not None and answer not in letters and answer not in choices:
        raise RowError(
            FORMAT,
            f"field `answer`: {answer!r:.80} is neither a letter from A to {letters[-1]} nor one of the choices.",
            where,
        )
    return row


# --- Region rows: boxes on images, origin at the top left, right and bottom edges exclusive ---


def region_row(raw: dict, where: str = "", size: tuple[int, int] | None = None) -> dict:
    """The row with its id as text and its box as floats.

    Args:
        size: width and height of the upright image, where it was opened.

    Raises:
        RowError: a field is missing or of the wrong kind, the box is empty or leaves the image, or `size` is another.
    """
    where = where or str(raw.get("id", ""))
    if missing := [field for field in REGION_FIELDS if raw.get(field) is None]:
        raise RowError(
            FORMAT,
            f"a region row needs the fields {', '.join(REGION_FIELDS)}; {', '.join(missing)} missing. Convert the source "
            "file with `vlm-sft-rl data convert`.",
            where,
        )
    check_box(raw["box"], where)
    for name in ("width", "height"):
        value = raw[name]
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise wrong_field(name, "a number of pixels", value, where)
    box, width, height = list(raw["box"]), raw["width"], raw["height"]
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
    return {**raw, "id": str(raw["id"]), "box": [float(v) for v in box]}


def check_box(box: object, where: str, field: str = "box", digits: int | None = 2) -> list[float]:
    """Four finite numbers, rounded to `digits` (None: as they are). Raises RowError."""
    if (
        not isinstance(box, Sequence)
        or len(box) != 4
        or not all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in box)
    ):
        raise wrong_field(field, "four numbers", box, where)
    return [float(v) if digits is None else round(float(v), digits) for v in box]


def from_xywh(box: object, where: str) -> list[float]:
    """`[x, y, width, height]` -> `[x0, y0, x1, y1]`. Raises RowError."""
    x, y, width, height = check_box(box, where, "bbox")
    return [x, y, round(x + width, 2), round(y + height, 2)]


def clip(box: Sequence[float], width: float, height: float) -> list[float] | None:
    """The part of a box inside the image, or None where a side of it is shorter than a pixel."""
    x0, y0, x1, y1 = box
    inside = [max(0.0, x0), max(0.0, y0), min(float(width), x1), min(float(height), y1)]
    return None if below_a_pixel(inside) else inside


def below_a_pixel(box: Sequence[float]) -> bool:
    """Whether a side of the box is shorter than a pixel; sides are taken to two decimals, as boxes are."""
    return round(min(box[2] - box[0], box[3] - box[1]), 2) < SMALLEST_SIDE


# --- Tags of verification ---


def tagged_share(rows: Any) -> tuple[int, int]:
    """`(rows that teach an answer with a verification tag, rows looked at)`, of training rows of any schema.

    Looked at are up to `ROWS_LOOKED_AT`, spread over the rows; where none of those has a tag, all until one has. Of a
    stream the first ones.
    """
    if not hasattr(rows, "__len__"):
        return _count_tagged(islice(rows, ROWS_LOOKED_AT))
    if hasattr(rows, "select_columns"):  # pictures stay closed
        rows = rows.select_columns([name for name in TRAINING if name in rows.column_names])
    step = max(1, len(rows) // ROWS_LOOKED_AT)
    tagged, seen = _count_tagged(rows[i] for i in range(0, len(rows), step))
    if tagged or step == 1:
        return tagged, seen
    return int(any(has_tags(rows[i]) for i in range(len(rows)))), len(rows)


def _count_tagged(rows: Iterable[dict]) -> tuple[int, int]:
    flags = [has_tags(raw) for raw in rows]
    return sum(flags), len(flags)


def has_tags(raw: dict) -> bool:
    """Whether a training row of any schema teaches an answer with a verification tag."""
    for turns in (raw.get(name) for name in TRAINING):
        for turn in turns if isinstance(turns, list) else [{"role": "assistant", "content": turns}]:
            if not isinstance(turn, dict) or turn.get("weight") == 0:
                continue
            role = turn.get("role") or turn.get("from")
            text = str(turn.get("content") or turn.get("value"))
            if ROLES.get(str(role)) == "assistant" and (CONFIDENT in text or UNCONFIDENT in text):
                return True
    return False
