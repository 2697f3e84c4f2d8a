"""Question files: `{"id", "images", "question", "answer", "choices"?, "unit"?, …}`, checked as a whole before any work."""

from collections.abc import Sequence
from pathlib import Path

from ..data.images import locate
from ..data.problems import RowError
from ..data.rows import read_raw, strip_none
from ..errors import UserError
from ..graders import Grader

FIELDS = ("id", "question", "answer")


def read_questions(
    path: str | Path,
    image_root: str | Path | None,
    grader: Grader | None = None,
    *,
    rationale: bool = False,
) -> list[dict]:
    """All questions of a JSONL or JSON file.

    Args:
        image_root: folder that image paths start from.
        grader: asked once for every question, so that unusable gold answers are found now.
        rationale: every row must have one (warm-up files).

    Raises:
        UserError: a field is missing or of the wrong type, an id comes twice, an image is missing, or the file is empty.
    """
    questions, seen = [], {}
    fields = (*FIELDS, "rationale") if rationale else FIELDS
    for number, raw in read_raw(path):
        where = f"{path}, row {number}"
        row = strip_none(raw)
        if "images" not in row and "image" in row:
            row["images"] = row.pop("image")
        if isinstance(row.get("images"), str):
            row["images"] = [row["images"]]
        row.setdefault("images", [])
        for name in fields:
            if (
                isinstance(row.get(name), int | float)
                and not isinstance(row[name], bool)
                and name != "question"
            ):
                row[name] = str(row[name])
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise UserError(
                    f"{where}: `{name}` must be text that is not empty, found {row.get(name)!r:.80}."
                )
        if row["id"] in seen:
            raise UserError(f"{where}: the id {row['id']!r} is already that of row {seen[row['id']]}.")
        if "#" in row["id"] or "/" in row["id"]:
            raise UserError(f"{where}: the id {row['id']!r} may contain neither `#` nor `/`. Rename it.")
        seen[row["id"]] = number
        try:
            for name in row["images"]:
                locate(name, image_root)
        except RowError as error:
            raise error.at(where) from error
        if grader is not None:
            try:
                grader("", row)
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
            except Exception as error:  # a grader is user code
                raise UserError(
                    f"{where}: the grader failed on an empty output ({type(error).__name__}: {error}). Correct the row "
                    "or the grader."
                ) from error
        questions.append(row)
    if not questions:
        raise UserError(f"{path}: there is no question in it.")
    return questions


def check_apart(train: Sequence[dict], test: Sequence[dict], where: str) -> None:
    """Raises UserError when a test question is also a training question (same images and text)."""
    known = {(tuple(q["images"]), q["question"]) for q in train}
    both = [q["id"] for q in test if (tuple(q["images"]), q["question"]) in known]
    if both:
        raise UserError(
            f"{where}: {len(both)} test questions are training questions too, the first is {both[0]!r}. Remove them from "
            "one of the files."
        )
