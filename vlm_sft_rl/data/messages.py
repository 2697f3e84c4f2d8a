"""The messages of a row: read from any of the known forms, checked, and given in the form that chat templates take."""

import re
from collections import Counter
from typing import Any

from ..errors import EMPTY_ANSWER, FORMAT, PLACEHOLDER, RowError, short
from .fields import check_unknown, is_number, picture_of, strip_none, wrong_field

IMAGE = "<image>"
# marks of other systems for pictures, video and sound, which would be learnt as text; words that are HTML too count where a
# message begins or ends with them
_NAMES = "image|img|video|audio|speech|picture|photo"
_FOREIGN = re.compile(
    r"<image[_ ]?\d+>|<\|(?:image|video|audio)(?:_\d+|_pad)?\|>|<\|vision_start\|>|<img>[^<>\n]{1,300}</img>"
    r"|<(?:ImageHere|image_placeholder|IMG_CONTEXT|start_of_image)>"
    rf"|\A(?:\s*<image>)*\s*(?!<image>)<(?i:{_NAMES})>|(?<=\n)(?!<image>)<(?i:{_NAMES})>(?=\s*\Z)"
)
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SUPERVISE = ("all", "text", "verdicts", "correction")
ATTEMPT, CORRECTION = "attempt", "correction"  # `answer_type` of drafts, see `corrections`
_MESSAGE = {
    "role",
    "content",
    "from",
    "value",
    "weight",
    "loss",
    "supervise",
    "doubts",
    "hint",
    "answer_type",
    "A_type",
}
_PART = {"type", "text", "image", "path", "url"}


def read_messages(
    raw: dict, turns: list[tuple[str, Any, str | None]], images: list, where: str, notes: Counter | None
) -> tuple[list[dict], list]:
    """The messages of a row's fields in their order, the system turn first, and the row's pictures.

    Args:
        turns: field, its value, and the role of a value that is text (None: it may not be).
        images: the pictures of the row itself.

    Raises RowError: no messages, a message that cannot be read, two system turns, or pictures in two places.
    """
    messages: list[dict] = []
    carried: list = []  # for each image part of typed content its picture, None where it has none
    for field, value, role in turns:
        if role is not None and isinstance(value, str):
            value = [{"role": role, "content": value}]
        if not isinstance(value, list | tuple) or not value:
            expected = "a list of messages" if role is None else "text or a list of messages"
            raise wrong_field(field, expected, value, where)
        messages += [_message(turn, field, i, where, carried, notes) for i, turn in enumerate(value)]
    if (system := raw.get("system")) not in (None, ""):
        if not isinstance(system, str):
            raise wrong_field("system", "text", system, where)
        turn = {"role": "system", "content": system}
        if messages[0]["role"] != "system":
            messages.insert(0, turn)
        elif messages[0]["content"] != system:
            raise RowError(FORMAT, "field `system` differs from the system message. Remove one.", where)
    pictures = [image for image in carried if image is not None]
    if not pictures:
        return messages, images
    if len(pictures) < len(carried) or (images and images != pictures):
        raise RowError(
            FORMAT,
            "some pictures stand in the messages and others in `image` or `images`. Put all of them in one place, in "
            "the order of their marks.",
            where,
        )
    return messages, pictures


def _message(turn: Any, field: str, i: int, where: str, carried: list, notes: Counter | None) -> dict:
    if not isinstance(turn, dict):
        raise wrong_field(f"{field}[{i}]", "an object", turn, where)
    get = turn.get
    speaker, content = get("from"), get("value")
    if speaker is None:
        speaker = get("role")
    elif (other := get("role")) is not None and ROLES.get(str(speaker)) != ROLES.get(str(other)):
        raise RowError(FORMAT, f"field `{field}[{i}]`: `from` and `role` differ. Remove one.", where)
    if content is None:
        content = get("content")
    elif (other := get("content")) is not None and other != content:
        raise RowError(FORMAT, f"field `{field}[{i}]`: `value` and `content` differ. Remove one.", where)
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise RowError(
            FORMAT, f"field `{field}[{i}]`: role {short(speaker)} is not one of {sorted(ROLES)}.", where
        )
    if not isinstance(content, str):
        if not isinstance(content, list):
            raise wrong_field(f"{field}[{i}]", "text", content, where)
        content = _join_parts(content, f"{field}[{i}]", where, carried, notes)
    message = {"role": role, "content": content}
    if len(turn) > 2:
        if not turn.keys() <= _MESSAGE:
            check_unknown(turn, _MESSAGE, where, notes, at=f"{field}[{i}].")
        _read_options(turn, message, field, i, where)
    return message


def _read_options(turn: dict, message: dict, field: str, i: int, where: str) -> None:
    """What a message says beside its text, read into `message`."""
    get = turn.get
    if (weight := get("weight")) is not None:
        if not is_number(weight) or weight not in (0, 1):
            raise wrong_field(f"{field}[{i}].weight", "0 or 1", weight, where)
        message["weight"] = int(weight)
    if (loss := get("loss")) is not None:
        if loss not in (0, 1):  # true and false are
            raise wrong_field(f"{field}[{i}].loss", "true or false", loss, where)
        if message.setdefault("weight", int(loss)) != loss or (loss and message["role"] != "assistant"):
            raise RowError(
                FORMAT,
                f"field `{field}[{i}].loss`: {loss!r} on a message of the {message['role']} with weight "
                f"{message['weight']}. Loss is on answers alone, and `weight` must say the same.",
                where,
            )
    if (supervise := get("supervise")) is not None:
        if supervise not in SUPERVISE:
            raise wrong_field(f"{field}[{i}].supervise", f"one of {', '.join(SUPERVISE)}", supervise, where)
        message["supervise"] = supervise
    if (doubts := get("doubts")) is not None:
        if not isinstance(doubts, list) or not all(is_number(p) and 0 <= p <= 1 for p in doubts):
            raise wrong_field(f"{field}[{i}].doubts", "a list of numbers from 0 to 1", doubts, where)
        message["doubts"] = doubts
    if (hint := get("hint")) is not None:
        if not isinstance(hint, str):
            if not isinstance(hint, list) or not all(isinstance(phrase, str) for phrase in hint):
                raise wrong_field(f"{field}[{i}].hint", "text, or a list of texts", hint, where)
            hint = ", ".join(hint)
        message["hint"] = hint
    kind, other = get("answer_type"), get("A_type")
    if kind is None:
        kind = other
    elif other is not None and other != kind:
        raise RowError(FORMAT, f"field `{field}[{i}]`: `answer_type` and `A_type` differ. Remove one.", where)
    if kind is not None:
        if not isinstance(kind, str):
            raise wrong_field(f"{field}[{i}].answer_type", "text", kind, where)
        message["answer_type"] = kind


def _join_parts(parts: list, field: str, where: str, carried: list, notes: Counter | None) -> str:
    """Typed content -> text with placeholders; the picture of each image part (or None) is appended to `carried`."""
    text, last = "", len(parts) - 1
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            if any(part.get(name) is not None for name in ("image", "path", "url")):
                raise RowError(FORMAT, f"field `{field}`: a picture in a part of text: {short(part)}.", where)
            text += part["text"]
        elif kind == "image":
            pictures = [
                strip_none(part[name]) for name in ("image", "path", "url") if part.get(name) is not None
            ]
            if any(picture != pictures[0] for picture in pictures) or part.get("text"):
                raise RowError(
                    FORMAT, f"field `{field}`: more than one thing in one part: {short(part)}.", where
                )
            carried.append(picture_of(pictures[0], field, where) if pictures else None)
            text += f"\n{IMAGE}" if i == last and text else f"{IMAGE}\n" if i < last else IMAGE
        else:
            raise RowError(FORMAT, f"field `{field}`: unknown content part {short(part)}.", where)
        if not part.keys() <= _PART:
            check_unknown(part, _PART, where, notes, at=f"{field}.content[].")
    return text


def check_order(messages: list[dict], where: str) -> None:
    """Raises RowError: turns that do not alternate from the user on, a system turn inside, or an attempt as the end."""
    roles = [message["role"] for message in messages]
    first = 1 if roles[:1] == ["system"] else 0
    if "system" in roles[1:]:
        raise RowError(FORMAT, "a system message may only come first.", where)
    if "assistant" in roles[first::2] or "user" in roles[first + 1 :: 2]:
        turn = next(i for i, role in enumerate(roles[first:]) if role != ("user", "assistant")[i % 2])
        raise RowError(
            FORMAT,
            f"turn {turn + 1} is by the {roles[first + turn]}, expected the {('user', 'assistant')[turn % 2]}: turns must "
            "alternate, beginning with the user. Merge neighbouring messages of one speaker.",
            where,
        )
    answers = messages[first + 1 :: 2]
    is_attempt = answers and answers[-1].get("answer_type") == ATTEMPT
    if is_attempt and [answer.get("answer_type") for answer in answers].count(ATTEMPT) == 1:
        raise RowError(FORMAT, "an attempt without a correction behind it.", where)


def typed_messages(row: dict) -> list[dict]:
    """The messages of an SFT row in the typed form that chat templates take: `content` = image and text parts.

    The one line break that sets a placeholder off from the text (`<image>\\nWhat is this?`) goes away with
    it: the templates write their own.

    Raises RowError: the placeholders do not match the images, or stand outside of user messages; an answer that is to be
    learnt has no text.
    """
    where, count = row.get("source") or row.get("id", ""), len(row.get("images") or [])
    texts = [message["content"] for message in row["messages"]]
    for i, message in enumerate(row["messages"]):
        if message["role"] == "assistant" and not texts[i].strip() and message.get("weight", 1) != 0:
            raise RowError(EMPTY_ANSWER, "an assistant message without text. Drop it or fill it in.", where)
        if message["role"] != "user" and IMAGE in texts[i]:
            raise RowError(
                PLACEHOLDER,
                f"{IMAGE} in message {i + 1} ({message['role']}): images belong to user messages. "
                "Remove it there, or write the word differently.",
                where,
            )
        if message["role"] == "user" and "<" in texts[i] and (mark := _FOREIGN.search(texts[i])):
            raise RowError(
                PLACEHOLDER,
                f"{short(mark[0].split(IMAGE)[-1].strip())} in message {i + 1} (user) is no mark here and would be read as "
                f"text. Pictures are marked with {IMAGE}; video and sound are not supported.",
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
