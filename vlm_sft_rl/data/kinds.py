"""Question rows, and how they and region rows (`regions`) are told from training rows.

{"id", "images": [path], "question", "answer"?, "choices"?, "answer_type"?, …ground truth…}
"""

from .problems import FORMAT, RowError

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
