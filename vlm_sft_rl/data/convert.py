"""Rewriting a file of a known schema as rows JSONL."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ..errors import UserError, first_line
from ..io import row_progress, rows_file
from ..locks import sole_use
from .rows import QUESTION, SFT, row_kind
from .sources import boxes, conversations, questions
from .sources.source import RegionFilter, Source

# A reader takes a `Source` and yields rows: SFT rows, question rows or region rows, with the images' paths of the published
# folder layout.
FORMATS = {
    "llava": conversations.llava,
    "reverse": conversations.llava,
    "llava_cot": conversations.llava_cot,
    "trl": conversations.trl,
    "tabmwp": questions.tabmwp,
    "chartqa": questions.chartqa,
    "clevr_math": questions.clevr_math,
    "geoqa": questions.geoqa,
    "m3cot": questions.m3cot,
    "easy_vqa": questions.easy_vqa,
    "coco": boxes.coco,
    "objects365": boxes.coco,
    "refcoco": boxes.refcoco,
    "sc_tune": boxes.sc_tune,
    "rec": boxes.rec,
    "jsonl": conversations.jsonl,
    "hf": conversations.hf,
}


def convert(
    source_path: str | Path,
    target_path: str | Path,
    format: str = "llava",
    *,
    keep: RegionFilter | None = None,
    progress: bool = False,
    **options,
) -> dict:
    """Stream `source_path` into rows JSONL at `target_path`, which is replaced only when all went well.

    Args:
        format: a name of `FORMATS`.
        keep: which region rows to keep; None keeps all.
        progress: show the number of rows on standard error.
        options: of `Source`. Images that come inside the file go to `images_dir`, by default `images` beside the target.

    Returns:
        `{"rows": n, "notes": {...}}`; the notes count what the rows no longer hold.

    Raises UserError: unknown format, unreadable or truncated source, full disk, boxes of another convention, no row left.
    RowError: a row of another schema.
    """
    if format not in FORMATS:
        raise UserError(f"Unknown format {format!r}. Choose one of {', '.join(FORMATS)}.")
    source, target = Source(Path(source_path), **options), Path(target_path)
    for path in (source.path, source.annotations):
        if path is not None and target.exists() and Path(path).resolve() == target.resolve():
            raise UserError(f"{path}: source and target are the same file. Choose another target.")
    folder, images = target.parent.resolve(), Path(source.images_dir or target.parent / "images").resolve()
    # rows name images from the folder of the target, unless those are written elsewhere
    base = folder if images.is_relative_to(folder) else images
    source = replace(source, images_dir=images, images_base=base)
    reader, notes = FORMATS[format], source.notes
    rows = _reading(reader(source), source.path)
    if keep is not None:
        rows = keep.apply(
            lambda counter: _reading(reader(replace(source, notes=counter)), source.path), notes
        )
    kinds, is_answered = Counter(), True
    show = row_progress(progress, f"converting {source.path.name}")
    with sole_use(target, is_file=True), rows_file(target) as write, show as advance:
        for row in rows:
            write(row)
            kinds[row_kind(row)] += 1
            is_answered &= "question" not in row or "answer" in row
            advance()
        # a question with its answer trains as a conversation does
        if len(kinds) > 1 and not (kinds.keys() <= {SFT, QUESTION} and is_answered):
            counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
            raise UserError(
                f"{source.path}: rows of several kinds in one file ({counts}). Convert each kind by itself."
            )
        if not kinds:
            reasons = ", ".join(f"{reason}: {number}" for reason, number in notes.items() if number)
            cure = (
                "Loosen the limits." if keep is not None and reasons else "Is this the right file and format?"
            )
            raise UserError(f"{source.path}: no row is left ({reasons or 'the file has none'}). {cure}")
    return {"rows": kinds.total(), "notes": {note: number for note, number in notes.items() if number}}


def _reading(rows: Iterator[dict], path: Path) -> Iterator[dict]:
    """The rows; an error of the system is one of reading, though it comes while the target is written."""
    try:
        yield from rows
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or first_line(error)}). Check the path."
        ) from error
