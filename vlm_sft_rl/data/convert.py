"""Rewriting a file of a known schema as rows JSONL."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..errors import UserError
from ..io import row_progress, rows_file
from .sources import FORMATS, Source
from .sources.boxes import RegionFilter


def convert(
    source_path: str | Path,
    target_path: str | Path,
    format: str = "llava",
    *,
    image_prefix: str = "",
    annotations: str | Path | None = None,
    fields: Mapping[str, str] | None = None,
    box_format: str = "xyxy",
    split: str | None = None,
    images_dir: str | Path | None = None,
    keep: RegionFilter | None = None,
    progress: bool = False,
) -> dict:
    """Stream `source_path` into rows JSONL at `target_path`, which is replaced only when all went well.

    Args:
        format: a name of `formats.FORMATS`.
        image_prefix: put before every image path.
        annotations: the second file of formats that need one (`refcoco`: instances.json).
        fields: `{our field: column}`, for `jsonl` and `hf`.
        box_format: "xyxy" or "xywh", for `rec`, `jsonl` and `hf`.
        split: for `hf` folders and `refcoco` files of several splits.
        images_dir: where `hf` writes images that come inside the file; by default `images` beside the target.
        keep: which region rows to keep; None keeps all.
        progress: show the number of rows on standard error.

    Returns:
        `{"rows": n, "notes": {...}}`; the notes count what the rows no longer hold.

    Raises:
        UserError: unknown format, unreadable or truncated source, full disk, no region left by `keep`.
            RowError: a row of another schema.
    """
    if format not in FORMATS:
        raise UserError(f"Unknown format {format!r}. Choose one of {', '.join(FORMATS)}.")
    if box_format not in ("xyxy", "xywh"):
        raise UserError(f"Unknown box format {box_format!r}: xyxy or xywh.")
    source, target = Path(source_path), Path(target_path)
    if target.exists() and source.resolve() == target.resolve():
        raise UserError(f"{source}: source and target are the same file. Choose another target.")
    notes: Counter = Counter()
    images = target.parent / "images" if images_dir is None else Path(images_dir)
    # rows name images from the folder of the target, unless those are written elsewhere
    inside = images.resolve().is_relative_to(target.parent.resolve())
    described = Source(
        path=source,
        image_prefix=image_prefix,
        annotations=None if annotations is None else Path(annotations),
        fields=dict(fields or {}),
        box_format=box_format,
        split=split,
        images_dir=images.resolve(),
        images_base=(target.parent if inside else images).resolve(),
        notes=notes,
    )
    reader, _ = FORMATS[format]
    rows = reader(described)
    if keep is not None:
        rows = keep.apply(lambda counter: reader(replace(described, notes=counter)), notes)
    count = 0
    with rows_file(target) as write, row_progress(progress, f"converting {source.name}") as advance:
        for row in rows:
            write(row)
            count += 1
            advance()
        if keep is not None and not count:
            reasons = (
                ", ".join(f"{reason}: {number}" for reason, number in notes.items()) or "the file has none"
            )
            raise UserError(f"{source}: no region is left ({reasons}). Loosen the limits.")
    return {"rows": count, "notes": {note: number for note, number in notes.items() if number}}
