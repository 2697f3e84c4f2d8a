"""Rows: the one shape that every training file is turned into.

    {"id": str, "messages": [{"role", "content", "weight"?, "hint"?, "answer_type"?, "supervise"?}],
     "images": [...], "source": "file:row"}

`content` is text in which `<image>` marks the place of an image (one for each entry of `images`; none at all
means "before the first question"). `images` holds paths relative to an image root, PIL images or
`datasets.Image` values. `weight` 0 takes a message out of the loss. `supervise` is "all" (the default),
"verdicts" (loss on the closing verification tags alone) or "correction" (no loss on stages that the same message
writes again). No torch here.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import FORMAT, PLACEHOLDER, RowError, UserError
from ..io import read_jsonl, stream_json_array

IMAGE = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
DROPPED_TURN = "leading assistant turn dropped"
SUPERVISE = ("all", "verdicts", "correction")

logger = logging.getLogger(__name__)


def strip_none(value: Any) -> Any:
    """Remove keys whose value is None, at every depth: Arrow adds them for fields that other rows have."""
    if isinstance(value, dict):
        return {key: strip_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [strip_none(item) for item in value]
    return value


def read_raw(path: str | Path) -> Iterator[tuple[int, dict]]:
    """Yield `(number, object)` from a JSON array (streamed) or from JSONL; the number is element or line.

    Raises:
        UserError: the file cannot be read, is neither, is truncated, or an element is not an object.
    """
    path = Path(path)
    if _first_character(path) != "[":
        yield from read_jsonl(path)
        return
    for number, raw in stream_json_array(path):
        if not isinstance(raw, dict):
            raise UserError(f"{path}, row {number}: expected a JSON object, found {type(raw).__name__}.")
        yield number, raw


def read_rows(path: str | Path) -> Iterator[dict]:
    """Yield the rows of a LLaVA, REVERSE, TRL (`messages`, `prompt`/`completion`) or question/answer file.

    Raises:
        RowError: a row has none of the known shapes; file, row and field are named.
    """
    notes: Counter = Counter()
    for number, raw in read_raw(path):
        yield to_row(raw, f"{path}:{number}", notes)
    for note, count in notes.items():
        logger.warning("%s: %s in %d rows", path, note, count)


def to_row(raw: dict, source: str, notes: Counter | None = None) -> dict:
    """Turn one object of any known schema into a row.

    Args:
        raw: the object as read; it is not changed.
        source: `file:row`, used in errors and kept in the row.
        notes: counts what was left out (a leading assistant turn, as the LLaVA code does).

    Raises:
        RowError: an unknown shape, role or field value.
    """
    raw = strip_none(raw)
    images = _images(raw, source)
    if "conversations" in raw:
        messages = _messages(raw["conversations"], "conversations", source, images)
    elif "messages" in raw:
        messages = _messages(raw["messages"], "messages", source, images)
    elif "prompt" in raw and "completion" in raw:
        prompt, completion = (
            [{"role": role, "content": raw[field]}] if isinstance(raw[field], str) else raw[field]
            for field, role in (("prompt", "user"), ("completion", "assistant"))
        )
        messages = _messages(prompt, "prompt", source, images) + _messages(
            completion, "completion", source, []
        )
    elif "question" in raw and "answer" in raw:
        pair = [{"role": "user", "content": raw["question"]}, {"role": "assistant", "content": raw["answer"]}]
        messages = _messages(pair, "question/answer", source, images)
    else:
        raise RowError(
            FORMAT,
            f"unknown row with the fields {sorted(raw)}. Expected `conversations`, `messages`, "
            "`prompt` and `completion`, or `question` and `answer`.",
            source,
        )
    body = [m for m in messages if m["role"] != "system"]
    if body and body[0]["role"] == "assistant":
        messages.remove(body.pop(0))
        if notes is not None:
            notes[DROPPED_TURN] += 1
    _check_order(messages, body, source)
    identity = raw.get("id", raw.get("question_id"))
    if identity is None:
        identity = f"{Path(source.rsplit(':', 1)[0]).stem}-{source.rsplit(':', 1)[-1]}"
    return {"id": str(identity), "messages": messages, "images": images, "source": source}


def typed_messages(row: dict) -> list[dict]:
    """The messages in the typed form that chat templates take: `content` = image and text parts.

    The one line break that sets a placeholder off from the text (`<image>\\nWhat is this?`) goes away with
    it: the templates write their own.

    Raises:
        RowError: the placeholders do not match the images, or stand outside of user messages.
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
    found = sum(text.count(IMAGE) for text in texts)
    if not found and count:
        first = next((i for i, m in enumerate(row["messages"]) if m["role"] == "user"), None)
        if first is None:
            raise RowError(PLACEHOLDER, "images but no user message to show them in. Add a question.", where)
        texts[first] = f"{IMAGE}\n" * count + texts[first]
    elif found != count:
        raise RowError(
            PLACEHOLDER,
            f"{found} {IMAGE} placeholders but {count} images. Write one placeholder for each image, or "
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


def _first_character(path: Path) -> str:
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as handle:
            while (character := handle.read(1)).isspace():
                pass
            return character
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror}). Check the path.") from error


def _images(raw: dict, source: str) -> list:
    value = raw.get("images", raw.get("image", []))
    field = "images" if "images" in raw else "image"
    images = list(value) if isinstance(value, list | tuple) else [value]
    for image in images:
        is_picture = hasattr(image, "convert")  # PIL, without importing it
        is_encoded = isinstance(image, dict) and ("bytes" in image or "path" in image)
        if not (is_picture or is_encoded or (isinstance(image, str) and image.strip())):
            raise RowError(
                FORMAT,
                f"field `{field}`: expected a path, a list of paths, or nothing; found {image!r:.80}. Leave "
                "the field out of text-only rows.",
                source,
            )
    return images


def _messages(turns: Any, field: str, source: str, images: list) -> list[dict]:
    if not isinstance(turns, list) or not turns:
        raise RowError(FORMAT, f"field `{field}`: expected a list of messages, found {turns!r:.80}.", source)
    return [_message(turn, f"{field}[{i}]", source, images) for i, turn in enumerate(turns)]


def _message(turn: Any, field: str, source: str, images: list) -> dict:
    if not isinstance(turn, dict):
        raise RowError(FORMAT, f"field `{field}`: expected an object, found {turn!r:.80}.", source)
    role = ROLES.get(turn.get("from", turn.get("role")))
    if role is None:
        found = turn.get("from", turn.get("role"))
        raise RowError(FORMAT, f"field `{field}`: role {found!r} is not one of {sorted(ROLES)}.", source)
    content = turn.get("value", turn.get("content"))
    if isinstance(content, list):
        content = _join_parts(content, field, source, images)
    if not isinstance(content, str):
        raise RowError(FORMAT, f"field `{field}`: expected text, found {content!r:.80}.", source)
    message = {"role": role, "content": content}
    if "weight" in turn:
        if turn["weight"] not in (0, 1):
            raise RowError(
                FORMAT, f"field `{field}.weight`: expected 0 or 1, found {turn['weight']!r}.", source
            )
        message["weight"] = int(turn["weight"])
    if "supervise" in turn:
        if turn["supervise"] not in SUPERVISE:
            raise RowError(
                FORMAT, f"field `{field}.supervise`: {turn['supervise']!r} is not one of {SUPERVISE}.", source
            )
        message["supervise"] = turn["supervise"]
    if (hint := turn.get("hint")) is not None:
        message["hint"] = ", ".join(map(str, hint)) if isinstance(hint, list) else str(hint)
    if (kind := turn.get("answer_type", turn.get("A_type"))) is not None:
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
            carried = part.get("image", part.get("path", part.get("url")))
            if carried is not None:
                images.append(carried)
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


# Question rows, and how they and region rows (`regions`) are told from training rows.
TRAINING = ("messages", "conversations", "completion", "chosen")
ANSWER_TYPES = ("choice", "number", "yes_no", "text")


def is_region(raw: dict) -> bool:
    return raw.get("box") is not None and not any(raw.get(name) is not None for name in TRAINING)


def is_question(raw: dict) -> bool:
    return raw.get("question") is not None and not any(raw.get(name) is not None for name in TRAINING)


def question_images(raw: dict) -> list:
    """The images of a question row. Raises nothing; a missing field is no image."""
    images = raw.get("images", raw.get("image"))
    return [] if images is None else list(images) if isinstance(images, list | tuple) else [images]


def check_question(raw: dict, where: str) -> None:
    """Raises RowError: no question, choices that are no list of texts, or an answer that is none of them."""
    if not isinstance(raw["question"], str) or not raw["question"].strip():
        raise RowError(FORMAT, f"field `question`: expected text, found {raw['question']!r:.80}.", where)
    choices, answer = raw.get("choices"), raw.get("answer")
    if choices is not None:
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) for c in choices):
            raise RowError(
                FORMAT, f"field `choices`: expected two texts or more, found {choices!r:.80}.", where
            )
        letters = [chr(ord("A") + i) for i in range(len(choices))]
        if answer is not None and answer not in letters and answer not in choices:
            raise RowError(
                FORMAT,
                f"field `answer`: {answer!r:.80} is neither a letter from A to {letters[-1]} nor one of the choices.",
                where,
            )


# Boxes of region rows: xyxy pixels, origin at the top left, right and bottom edges exclusive.
SMALLEST_SIDE = 1.0  # pixels; less is a mistake of annotation


def check_box(box: object, where: str, field: str = "box", digits: int | None = 2) -> list[float]:
    """Four finite numbers, rounded to `digits` (None: as they are). Raises RowError."""
    if (
        not isinstance(box, Sequence)
        or len(box) != 4
        or not all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in box)
    ):
        raise RowError(FORMAT, f"field `{field}`: expected four numbers, found {box!r:.80}.", where)
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
