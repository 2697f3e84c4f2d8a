"""Questions that several people answered: VQAv2 and OK-VQA, VizWiz."""

from collections.abc import Iterator
from pathlib import Path

from ...data.rows import read_raw
from ...data.sources.source import Source, take, take_text
from ...errors import FORMAT, RowError, UserError
from ...io import stream_json_arrays


def vqa(
    source: Source, annotations: Path, answer: str = "answer", image: str = "COCO_val2014_{:012d}.jpg"
) -> Iterator[dict]:
    """VQA's question file: `questions` (`question_id`, `image_id`, `question`).

    Args:
        annotations: the file with `annotations`: `question_id`, `answers` (`answer`), `answer_type`.
        answer: the field of an answer that is compared with; OK-VQA has stems in `answer` and words in `raw_answer`.
        image: a picture's file name by its id.
    """
    try:
        image.format(0)
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(
            f"reader 'vqa': reader_options: image is {image!r}, expected a name with one place for the number, such as "
            "COCO_val2014_{:012d}.jpg."
        ) from error
    told = {}
    for _, number, raw in stream_json_arrays(annotations, ("annotations",)):
        at = f"{annotations}:{number}"
        told[take_text(raw, "question_id", at)] = _answers(raw, at, answer), raw.get("answer_type")
    for _, number, raw in stream_json_arrays(source.path, ("questions",)):
        where = source.at(number)
        identity = take_text(raw, "question_id", where)
        if identity not in told:
            raise RowError(
                FORMAT, f"question {identity} has no answers in {annotations}: another split?", where
            )
        answers, kind = told[identity]
        row = {
            "id": identity,
            "images": [source.image(image.format(take(raw, "image_id", int, where)))],
            "question": take_text(raw, "question", where),
            "answers": answers,
        }
        yield row | ({"category": kind} if kind else {})


def vizwiz(source: Source) -> Iterator[dict]:
    """VizWiz `val.json`: `[{"image", "question", "answers": [{"answer"}], "answer_type"}]`."""
    for number, raw in read_raw(source.path):
        where = source.at(number)
        name = take_text(raw, "image", where)
        row = {
            "id": name.rsplit(".", 1)[0],
            "images": [source.image(name)],
            "question": take_text(raw, "question", where),
            "answers": _answers(raw, where),
        }
        yield row | ({"category": raw["answer_type"]} if raw.get("answer_type") else {})


def _answers(raw: dict, where: str, name: str = "answer") -> list[str]:
    """A blank answer counts: nobody agrees with it."""
    return [take(one, name, str, where) for one in take(raw, "answers", list, where)]
