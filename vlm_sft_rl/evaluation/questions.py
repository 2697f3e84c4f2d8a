"""Question files: read and checked as a whole before the model is loaded."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..data.chat import IMAGE
from ..data.images import locate, open_image
from ..data.rows import LETTERS, option_texts
from ..data.sources.source import Source
from ..errors import MISSING_IMAGE, RowError, UserError
from ..runs import digest, file_digest
from ..shapes import fault
from .metrics.counting import CountMetric
from .readers import file_options, read_questions
from .results import REFERENCE, check_reference
from .specs import EvalSpec

PICTURES = ".pictures"  # below image_root: pictures that come inside a question file
ASKED = {"id": str, "question": str, "images": [str], **REFERENCE}


@dataclass(frozen=True)
class Questions:
    """Checked rows in file order, with the folder their image paths are relative to and the files' digest."""

    spec: EvalSpec
    rows: list[dict]
    image_root: Path
    digest: str

    def prompt(self, row: dict) -> str:
        """The text that the model is asked."""
        return prompt_of(self.spec, row)

    def images(self, row: dict) -> list | None:
        """The row's pictures, opened; None for a question without any. Raises RowError: one cannot be read."""
        try:
            return [open_image(name, self.image_root) for name in row["images"]] or None
        except RowError as error:
            raise error.at(f"question {row['id']!r}") from error


def prompt_of(spec: EvalSpec, row: dict) -> str:
    """The text that the model is asked."""
    choices = row.get("choices") or ()
    template = spec.prompt if choices else spec.open_prompt or spec.prompt
    lettered = zip(LETTERS, option_texts(choices), strict=False)
    options = "\n".join(f"{letter}. {text}" for letter, text in lettered)
    texts = {"{question}": row["question"], "{choices}": options}
    # one pass: what stands in a question is never taken for a placeholder
    return re.sub(r"\{(?:question|choices)\}", lambda match: texts[match.group()], template)


def _reference(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in ("id", "images", "question")}


def to_sample(row: dict, prompt: str, answer: dict) -> dict:
    """The line of samples.jsonl for an answer.

    Args:
        row: the question row; all but its images and question become `reference`.
        prompt: what the model was asked.
        answer: `decoding`'s `Answer.to_json()`, for questions about boxes with `located` or `leak` (`regions`).
    """
    boxes = {key: answer[key] for key in ("located", "leak") if key in answer}
    return {
        "id": row["id"],
        "images": row["images"],
        "question": row["question"],
        "prompt": prompt,
        "answer": answer["text"],
        "tagged_answer": answer["tagged_text"],
        "accepted_answer": answer["accepted_text"],
        "best_effort_answer": answer["best_effort_text"],
        "ok": answer["ok"],
        "spans": answer["spans"],
        "counts": answer["counts"],
        "trace": answer["trace"],
        "reference": _reference(row),
        **boxes,
    }


def check_answered(questions: Questions, answers: dict[str, dict], folder: Path) -> None:
    """Raises UserError: an answer that the folder holds already is to another question than is asked."""
    for row in questions.rows:
        if (sample := answers.get(row["id"])) is None:
            continue
        expected = {"images": row["images"], "question": row["question"], "reference": _reference(row)}
        wrong = [key for key, value in json.loads(json.dumps(expected)).items() if sample[key] != value]
        if wrong:
            raise UserError(
                f"{folder}: the answer to {row['id']!r} has another `{wrong[0]}` than the question file: it was edited, "
                "or comes from elsewhere. Remove its line; the rest is kept."
            )


def load_questions(
    spec: EvalSpec, data_dir: str | Path, metric: CountMetric, limit: int | None = None
) -> Questions:
    """Read the spec's question files and check rows, ids, ground truth and that every image exists.

    Args:
        limit: take only the first `limit` rows; the others are not checked.

    Raises UserError: the file or images are missing (with the place where the owners publish them), or a row is wrong.
    """
    data_dir = Path(data_dir)
    image_root = (data_dir / spec.image_root).resolve()
    file_keys = file_options(spec.reader)
    files = {key: path for key, path in spec.reader_options.items() if key in file_keys}
    inputs = [_existing(spec, data_dir, path) for path in (*spec.question_files().values(), *files.values())]
    rows, seen, absent, categories, cut = [], {}, [], set(), False
    for where, row in _read(spec, data_dir, image_root, categories):
        if len(rows) == limit:
            cut = True
            break
        _check_row(row, where, metric, seen)
        _check_prompt(spec, row, where)
        for name in row["images"]:
            try:
                locate(name, image_root)
            except RowError as error:
                if error.kind != MISSING_IMAGE:
                    raise error.at(where) from error
                absent.append((where.rsplit(", ", 1)[-1], name))
        rows.append({key: value for key, value in row.items() if value is not None})
    if not cut and (unknown := [name for name in spec.categories if name not in categories]):
        known = "Its questions have no categories."
        if categories:
            known = f"There are {', '.join(sorted(categories))}."
        raise UserError(f"{inputs[0]}: no question of the category {unknown[0]!r} in it. {known}")
    if not rows:
        raise UserError(f"{inputs[0]}: no question in it. Fetch or write it again.")
    if absent:
        place, name = absent[0]
        source = spec.source_of(str(Path(spec.image_root) / name)) or spec.source_of("images")
        cure = f" Their source: {source}." if source else " Give the folder that holds them with --data-dir."
        raise UserError(
            f"{inputs[0]}: {len(absent)} of {sum(len(row['images']) for row in rows)} images are missing below "
            f"{image_root}; the first is {name!r} ({place}).{cure}"
        )
    return Questions(spec, rows, image_root, _digest(inputs))


def _existing(spec: EvalSpec, data_dir: Path, relative: str) -> Path:
    path = data_dir / relative
    if not path.exists():
        cure = f"Put it there, or give its folder with --data-dir (now {data_dir})."
        if source := spec.source_of(relative):
            cure = f"Its source: {source}."
        raise UserError(f"{path}: no such file; the benchmark {spec.name!r} needs it. {cure}")
    return path


def _read(
    spec: EvalSpec, data_dir: Path, image_root: Path, categories: set[str]
) -> Iterator[tuple[str, dict]]:
    """Rows of the spec's categories with their places; the names of all that come by go into `categories`."""
    file_keys = file_options(spec.reader)
    files = {key: data_dir / path for key, path in spec.reader_options.items() if key in file_keys}
    options = {key: value for key, value in spec.reader_options.items() if key not in file_keys}
    for category, relative in spec.question_files().items():
        source = Source(data_dir / relative, images_dir=image_root / PICTURES, images_base=image_root)
        for where, row in read_questions(spec.reader, source, files, options):
            if category is not None:
                # files of one benchmark number their questions from 1, each by itself
                name = f"{category}_{row['category']}" if row.get("category") else category
                row = row | {"id": f"{category}-{row['id']}", "category": name}
            kinds = row.get("category")
            names = (category, *(kinds if isinstance(kinds, list) else [kinds]))
            belongs = {str(name) for name in names if name is not None}
            categories |= belongs
            if not spec.categories or belongs & set(spec.categories):
                yield where, row


def _check_row(row: dict, where: str, metric: CountMetric, seen: dict[str, str]) -> None:
    for key in ("id", "question", "images", *metric.reference_fields):
        if key not in row:
            raise UserError(f"{where}: the field {key!r} is missing. Every question row needs it.")
    if reason := fault(row, ASKED):
        raise UserError(f"{where}: {reason}.")
    if not row["id"]:
        raise UserError(f"{where}: 'id' is empty.")
    if row["id"] in seen:
        raise UserError(
            f"{where}: the id {row['id']!r} is already that of {seen[row['id']]}. Ids must differ."
        )
    seen[row["id"]] = where.rsplit(", ", 1)[-1]
    check_reference(row, metric, where)


def _check_prompt(spec: EvalSpec, row: dict, where: str) -> None:
    if spec.regions is not None:  # words of the checkpoint's own
        return
    prompt = prompt_of(spec, row)
    if not prompt.strip():
        raise UserError(f"{where}: 'question' is empty, so there is nothing to ask.")
    if (marks := prompt.count(IMAGE)) not in (0, len(row["images"])):
        raise UserError(f"{where}: {marks} {IMAGE} marks in the question and {len(row['images'])} images.")


def _digest(paths: list[Path]) -> str:
    """Of the one question file, or of all files that the questions are made from."""
    if len(paths) == 1 and paths[0].is_file():
        return digest(paths[0])
    total = hashlib.sha256()
    for path in paths:
        for part in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if part.is_file():
                total.update(f"{part.name} {file_digest(part)}\n".encode())
    return total.hexdigest()[:16]
