"""Rewriting a file of a known schema as rows JSONL."""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from .formats import FORMATS, Source


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
    progress: bool = False,
) -> dict:
    """Stream `source_path` into rows JSONL at `target_path`, which is replaced only when all went well.

    Args:
        format: a name of `formats.FORMATS`.
        image_prefix: put before every image path.
        annotations: the second file of formats that need one (`refcoco`: instances.json).
        fields: `{our field: column}`, for `jsonl` and `hf`.
        box_format: "xyxy" or "xywh", for `rec`, `jsonl` and `hf`.
        split: for `hf` folders of several splits.
        images_dir: where `hf` writes images that come inside the file; by default `images` beside the target.
        progress: show the number of rows on standard error.

    Returns:
        `{"rows": n, "notes": {...}}`; the notes count what the rows no longer hold.

    Raises:
        UserError: unknown format, unreadable or truncated source, full disk. RowError: a row of another
            schema.
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
    count, temporary = 0, None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.NamedTemporaryFile(
                "w", encoding="utf-8", dir=target.parent, prefix=f".{target.name}.", delete=False
            ) as out,
            _progress(progress, source.name) as advance,
        ):
            temporary = Path(out.name)
            for row in reader(described):
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
                advance()
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(
            f"{target}: cannot write ({error.strerror or error}). Free some disk space."
        ) from error
    finally:
        if temporary is not None and temporary.exists():
            temporary.unlink()
    return {"rows": count, "notes": {note: number for note, number in notes.items() if number}}


@contextmanager
def _progress(show: bool, name: str):
    if not show:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = [TextColumn("converting {task.description}"), BarColumn(), TextColumn("{task.completed} rows")]
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda: bar.advance(task)
