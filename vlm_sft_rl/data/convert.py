"""Rewriting a file of a known schema as rows JSONL."""

import json
import os
import tempfile
from collections import Counter
from pathlib import Path

from ..errors import UserError
from .problems import FORMAT, RowError
from .rows import read_raw, to_row

FORMATS = {
    "llava": ("conversations",),
    "reverse": ("conversations",),
    "trl": ("messages", "prompt", "question"),
}


def convert(source_path: str | Path, target_path: str | Path, format: str = "llava") -> dict:
    """Stream `source_path` into rows JSONL at `target_path`, which is replaced only when all went well.

    Args:
        format: "llava", "reverse" (the published tagged schema) or "trl" (`messages`, `prompt`/`completion`).

    Returns:
        `{"rows": n, "notes": {...}}`; the notes count what the rows no longer hold.

    Raises:
        UserError: unknown format, unreadable or truncated source, full disk. RowError: a row of another schema.
    """
    if format not in FORMATS:
        raise UserError(f"Unknown format {format!r}. Choose one of {', '.join(FORMATS)}.")
    source, target = Path(source_path), Path(target_path)
    if target.exists() and source.resolve() == target.resolve():
        raise UserError(f"{source}: source and target are the same file. Choose another target.")
    notes: Counter = Counter()
    count, temporary = 0, None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=target.parent, prefix=f".{target.name}.", delete=False
        ) as out:
            temporary = Path(out.name)
            for number, raw in read_raw(source):
                if not any(raw.get(field) is not None for field in FORMATS[format]):
                    raise RowError(
                        FORMAT,
                        f"no `{'`, `'.join(FORMATS[format])}`, so this is not the format {format!r}. The row has "
                        f"{sorted(raw)}.",
                        f"{source}:{number}",
                    )
                row = to_row(raw, f"{source}:{number}", notes)
                del row["source"]  # from now on the row's place is its line in the target
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
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
    return {"rows": count, "notes": dict(notes)}
