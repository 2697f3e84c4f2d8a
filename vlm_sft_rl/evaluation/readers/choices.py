"""Multiple choice: MMStar, AI2D, MMMU, MathVista as Hugging Face parquet with the pictures inside, ScienceQA as JSON.

`split` says which files of a folder are read, for ScienceQA which questions.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import replace

from ...data.sources.conversations import read_records
from ...data.sources.questions import LETTERS
from ...data.sources.source import Source, take, take_text
from ...errors import FORMAT, RowError
from ...io import stream_json_object

_OPTION = re.compile(r"(?:^|[\s,])([A-J])[:.]\s*")


def mmstar(source: Source, split: str | None = None) -> Iterator[dict]:
    """`index`, `question` (with its options: `… Options: A: …, B: …`), `image`, `answer` (letter), `category`."""
    for number, raw in read_records(replace(source, split=split)):
        where = source.at(number)
        question, choices = split_options(take_text(raw, "question", where), where)
        yield {
            "id": take_text(raw, "index", where),
            "images": [take_text(raw, "image", where)],
            "question": question,
            "choices": choices,
            "answer": _letter(take_text(raw, "answer", where), choices, where),
            "category": take_text(raw, "category", where),
        }


def split_options(text: str, where: str) -> tuple[str, list[str]]:
    """Question and options of a text that ends in `Options: A: one, B: two`. Raises RowError where it does not."""
    question, mark, rest = text.rpartition("Options:")
    found = list(_OPTION.finditer(" " + rest))
    # only the letters that follow one another from A are labels; "A." inside an option is not
    labels, wanted = [], 0
    for match in found:
        if match[1] == LETTERS[wanted]:
            labels.append(match)
            wanted += 1
    if not mark or len(labels) < 2:
        raise RowError(
            FORMAT, f"`question`: expected `Options: A: …, B: …` at its end, found {text!r:.120}.", where
        )
    ends = [label.start() for label in labels[1:]] + [len(rest) + 1]
    options = [(" " + rest)[label.end() : end] for label, end in zip(labels, ends, strict=True)]
    return question.strip(), [option.strip().rstrip(",").strip() for option in options]


def ai2d(source: Source, split: str | None = None) -> Iterator[dict]:
    """`question`, `options` (four texts), `answer` (index of the right one, as text), `image`."""
    for number, raw in read_records(replace(source, split=split)):
        where = source.at(number)
        choices = [str(option) for option in take(raw, "options", list, where)]
        yield {
            "id": f"ai2d-{number}",
            "images": [take_text(raw, "image", where)],
            "question": take_text(raw, "question", where),
            "choices": choices,
            "answer": _letter_at(take_text(raw, "answer", where), choices, where),
        }


def mmmu(source: Source, split: str | None = None) -> Iterator[dict]:
    """`id`, `question`, `options` (a Python list as text; empty for open questions), `answer`, `image_1` … `image_7`,
    `question_type`; the subject is the middle of the id (validation_Accounting_1)."""
    for number, raw in read_records(replace(source, split=split)):
        where = source.at(number)
        identity = take_text(raw, "id", where)
        images = [raw[f"image_{i}"] for i in range(1, 8) if raw.get(f"image_{i}")]
        row = {
            "id": identity,
            "images": images,
            "question": take_text(raw, "question", where),
            "category": "_".join(identity.split("_")[1:-1]) or None,
        }
        options, answer = _options(raw.get("options"), where), take_text(raw, "answer", where)
        if options:
            yield row | {"choices": options, "answer": _letter(answer, options, where)}
        else:
            yield row | {"answer": answer}


def mathvista(source: Source, split: str | None = None) -> Iterator[dict]:
    """`pid`, `question`, `decoded_image`, `choices`, `answer`, `question_type`, `answer_type`, `precision`, `unit`,
    `metadata.task`."""
    for number, raw in read_records(replace(source, split=split)):
        where = source.at(number)
        row = {
            "id": take_text(raw, "pid", where),
            "images": [take_text(raw, "decoded_image", where)],
            "question": take_text(raw, "question", where),
            "category": (raw.get("metadata") or {}).get("task"),
        }
        answer, choices = take_text(raw, "answer", where), raw.get("choices")
        if choices:
            texts = [str(choice).strip() for choice in choices]
            if answer not in texts:
                raise RowError(FORMAT, f"`answer`: {answer!r:.80} is none of the choices {texts}.", where)
            yield row | {"choices": texts, "answer": LETTERS[texts.index(answer)]}
        else:
            extra = {
                name: str(raw[name])
                for name in ("precision", "unit", "answer_type")
                if raw.get(name) is not None
            }
            yield row | {"answer": answer, **extra}


def scienceqa(source: Source, split: str = "test") -> Iterator[dict]:
    """ScienceQA `problems.json`: id -> `question`, `choices`, `answer` (index), `hint`, `image`, `subject`, `split`;
    pictures in `SPLIT/ID/`. Questions without a picture are left out."""
    for identity, raw in stream_json_object(source.path):
        where = source.at(identity)
        if take_text(raw, "split", where) != split or not raw.get("image"):
            continue
        choices = [str(choice) for choice in take(raw, "choices", list, where)]
        yield {
            "id": identity,
            "images": [source.image(split, identity, take_text(raw, "image", where))],
            "question": "\n".join(
                filter(None, [str(raw.get("hint") or "").strip(), take_text(raw, "question", where)])
            ),
            "choices": choices,
            "answer": _letter_at(str(take(raw, "answer", int, where)), choices, where),
            "category": take_text(raw, "subject", where),
        }


def _options(value, where: str) -> list[str]:
    """MMMU writes the list as Python text. Raises RowError: it is no list of texts."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError) as error:
            raise RowError(
                FORMAT, f"`options`: expected a list as text, found {value!r:.80}.", where
            ) from error
    if not isinstance(value, list):
        raise RowError(FORMAT, f"`options`: expected a list, found {value!r:.80}.", where)
    return [str(option) for option in value]


def _letter_at(index: str, choices: list[str], where: str) -> str:
    if not index.isdigit() or int(index) >= len(choices):
        raise RowError(FORMAT, f"`answer`: expected an index below {len(choices)}, found {index!r}.", where)
    return LETTERS[int(index)]


def _letter(answer: str, choices: list[str], where: str) -> str:
    letter = answer.strip("(). ").upper()
    if len(letter) != 1 or letter not in LETTERS[: len(choices)]:
        raise RowError(
            FORMAT, f"`answer`: expected a letter up to {LETTERS[len(choices) - 1]}, found {answer!r}.", where
        )
    return letter
