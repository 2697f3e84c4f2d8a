"""Question rows and region rows: how they are told from training rows, and what must hold in them.

question row  {"id", "images": [path], "question", "answer"?, "choices"?, "answer_type"?, …ground truth…}
region row    {"id"?, "image": path, "width", "height", "box": [x0, y0, x1, y1], "category"?, "expressions"?}
"""

from typing import Any

from .problems import FORMAT, RowError
from .regions import check_box

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


def check_region(raw: dict, where: str, size: tuple[int, int] | None = None) -> None:
    """Raises RowError: a box that is none or leaves the image, or a size that is not the image's.

    Args:
        size: width and height of the upright image, where it could be opened.
    """
    x0, y0, x1, y1 = check_box(raw["box"], where)
    width, height = (_side(raw, name, where) for name in ("width", "height"))
    if size is not None and (width, height) != size:
        raise RowError(
            FORMAT,
            f"fields `width`, `height`: {width} x {height}, but the image has {size[0]} x {size[1]} pixels. Boxes are in "
            "pixels of the upright image: scale them to it.",
            where,
        )
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise RowError(
            FORMAT,
            f"field `box`: {raw['box']} is no [x0, y0, x1, y1] inside an image of {width} x {height} pixels. Convert "
            "with --box-format xywh if these are x, y, width and height.",
            where,
        )
    expressions: Any = raw.get("expressions")
    if expressions is not None and (
        not isinstance(expressions, list)
        or not expressions
        or not all(isinstance(text, str) and text.strip() for text in expressions)
    ):
        raise RowError(FORMAT, f"field `expressions`: expected texts, found {expressions!r:.80}.", where)


def _side(raw: dict, name: str, where: str) -> int | float:
    value = raw.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise RowError(FORMAT, f"field `{name}`: expected a number of pixels, found {value!r:.80}.", where)
    return value
