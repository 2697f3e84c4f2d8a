"""Question files: read and checked as a whole before the model is loaded."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ..data.images import locate, open_image
from ..data.problems import MISSING_IMAGE, RowError
from ..errors import UserError
from ..files import read_jsonl
from .metrics.counting import CountMetric
from .specs import EvalSpec


@dataclass(frozen=True)
class Questions:
    """Checked rows in file order, with the folder their image paths are relative to and the file's digest."""

    rows: list[dict]
    image_root: Path
    digest: str

    def prompt(self, row: dict, template: str) -> str:
        return template.replace("{question}", row["question"])

    def images(self, row: dict) -> list | None:
        """The row's pictures, opened; None for a question without any."""
        return [open_image(name, self.image_root) for name in row["images"]] or None


def _missing(path: Path, spec: EvalSpec, relative: str, what: str) -> str:
    source = spec.source_of(relative)
    cure = (
        f"Its source: {source}." if source else f"Put it there, or give its folder with --data-dir ({what})."
    )
    return f"{path}: no such file; the benchmark {spec.name!r} needs it. {cure}"


def _check_row(row: dict, where: str, metric: CountMetric, seen: dict[str, int], number: int) -> None:
    for key in ("id", "question", "images", metric.reference_field):
        if key not in row:
            raise UserError(f"{where}: the field {key!r} is missing. Every question row needs it.")
    if not isinstance(row["id"], str) or not row["id"]:
        raise UserError(f"{where}: 'id' must be text that is not empty, found {row['id']!r}.")
    if row["id"] in seen:
        raise UserError(
            f"{where}: the id {row['id']!r} is already that of line {seen[row['id']]}. Ids must differ."
        )
    seen[row["id"]] = number
    if not isinstance(row["question"], str):
        raise UserError(f"{where}: 'question' must be text, found {row['question']!r}.")
    if not isinstance(row["images"], list) or not all(isinstance(name, str) for name in row["images"]):
        raise UserError(f"{where}: 'images' must be a list of paths, found {row['images']!r}.")
    try:
        metric.sample_counts("", row[metric.reference_field])
    except UserError as error:
        raise UserError(f"{where}, field {metric.reference_field!r}: {error}") from error
    except TypeError as error:
        raise UserError(f"{where}, field {metric.reference_field!r}: cannot be used ({error}).") from error


def load_questions(
    spec: EvalSpec, data_dir: str | Path, metric: CountMetric, limit: int | None = None
) -> Questions:
    """Read the spec's question file and check rows, ids, ground truth and that every image exists.

    Args:
        limit: take only the first `limit` rows; the others are not checked.

    Raises:
        UserError: the file or images are missing (with the place where the owners publish them), or a row is wrong.
    """
    data_dir = Path(data_dir)
    path = data_dir / spec.questions
    if not path.is_file():
        raise UserError(_missing(path, spec, spec.questions, "now " + str(data_dir)))
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, found {limit}.")
    image_root = (data_dir / spec.image_root).resolve()
    rows, seen, absent = [], {}, []
    for number, row in read_jsonl(path):
        if limit is not None and len(rows) == limit:
            break
        _check_row(row, f"{path}, line {number}", metric, seen, number)
        for name in row["images"]:
            try:
                locate(name, image_root)
            except RowError as error:
                if error.kind != MISSING_IMAGE:
                    raise error.at(f"{path}, line {number}") from error
                absent.append((number, name))
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: no question in it. Fetch or write it again.")
    if absent:
        number, name = absent[0]
        source = spec.source_of(str(Path(spec.image_root) / name)) or spec.source_of("images")
        cure = f" Their source: {source}." if source else " Give the folder that holds them with --data-dir."
        raise UserError(
            f"{path}: {len(absent)} of {sum(len(row['images']) for row in rows)} images are missing below "
            f"{image_root}; the first is {name!r} (line {number}).{cure}"
        )
    return Questions(rows, image_root, hashlib.sha256(path.read_bytes()).hexdigest()[:16])
