"""Writing a JSONL file of any length so that it appears when it is complete."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError


@contextmanager
def rows_file(target: str | Path) -> Iterator[Callable[[dict], None]]:
    """Yield a function that writes one row; `target` is replaced when the block ends without an error.

    Raises:
        UserError: the disk is full, or the folder cannot be written to. The old file is left as it was.
    """
    target, temporary = Path(target), None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=target.parent, prefix=f".{target.name}.", delete=False
        ) as out:
            temporary = Path(out.name)
            yield lambda row: out.write(json.dumps(row, ensure_ascii=False) + "\n") and None
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


@contextmanager
def row_progress(show: bool, what: str) -> Iterator[Callable[[], None]]:
    """Yield a function that counts one row on a progress bar on standard error."""
    if not show:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} rows")]
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda: bar.advance(task)
