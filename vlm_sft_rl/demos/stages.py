"""Stages of a long job: each is done once, by the code that is here now, and its time is known whatever interrupts it."""

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from .. import __version__
from ..errors import UserError
from ..io import read_json, write_json

PACKAGE = Path(__file__).parents[1]
BEAT_SECONDS = 5.0  # a killed attempt is short by this at the most


class Stages:
    """The finished stages of a folder, in `stages.json`.

    Args:
        folder: of the job.
        keep_stale: go on with results that other code made, and say so, instead of stopping.

    Attributes:
        seconds: time of each stage, all attempts added up.
        stale: stages whose results other code made.
    """

    def __init__(self, folder: str | Path, console: Console, *, keep_stale: bool = False):
        self.folder, self.console, self.keep_stale = Path(folder), console, keep_stale
        self.path = self.folder / "stages.json"
        self.stale: list[str] = []
        self._lock = threading.Lock()
        records = read_json(self.path) if self.path.exists() else {}
        # stages used to be noted by their seconds alone
        self._records = {
            n: r if isinstance(r, dict) else {"seconds": r, "done": True} for n, r in records.items()
        }

    @property
    def seconds(self) -> dict[str, float]:
        return {name: record["seconds"] for name, record in self._records.items()}

    def run(self, name: str, action: Callable[[], object], uses: Sequence[str | Path]) -> None:
        """Run `action` unless it was finished before.

        Args:
            uses: files and folders that the result depends on; text is relative to the package.

        Raises:
            UserError: it was begun or finished by other code than is here now, and stale results are not to be kept.
        """
        now, record = fingerprints(uses), self._records.get(name)
        if record is not None:
            self._check(name, record, now)
        if record is not None and record["done"]:
            self.console.print(f"[dim]{name}: done before[/]")
            return
        self.console.rule(f"[bold]{name}", align="left")
        record = record or {"seconds": 0.0, "done": False, "version": __version__, "made_by": now}
        with self._timed(name, record):
            action()
        self._write(name, self._records[name] | {"done": True})

    def _check(self, name: str, record: dict, now: dict[str, str]) -> None:
        made_by = record.get("made_by")
        if made_by == now:
            return
        changed = "an unknown version" if made_by is None else f"version {record['version']}"
        if made_by is not None:
            parts = sorted(part for part in {*made_by, *now} if made_by.get(part) != now.get(part))
            changed += f" with another {', '.join(parts)}"
        words = f'{self.path}: the stage "{name}" was made by {changed}; this is version {__version__}.'
        if not self.keep_stale:
            raise UserError(
                f"{words} Its results and those of later stages may no longer be what this code gives. Choose another "
                "--output-dir or delete the folder to make them anew, or go on with them: `demo NAME --keep-stale`."
            )
        self.stale.append(name)
        self.console.print(f"[yellow]{words} Kept as it is.[/]")

    @contextmanager
    def _timed(self, name: str, record: dict):
        started, ended = time.monotonic(), threading.Event()

        def note() -> None:
            seconds = record["seconds"] + time.monotonic() - started
            self._write(name, record | {"seconds": round(seconds, 1)})

        def beat() -> None:
            while not ended.wait(BEAT_SECONDS):
                note()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            note()

    def _write(self, name: str, record: dict) -> None:
        with self._lock:
            self._records[name] = record
            write_json(self.path, self._records)


def fingerprints(uses: Sequence[str | Path]) -> dict[str, str]:
    """A digest of each file, or of all files below each folder.

    Raises:
        UserError: there is no such file or folder.
    """
    return {str(part) if isinstance(part, str) else part.name: _digest(PACKAGE / part) for part in uses}


def _digest(path: Path) -> str:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    files = [file for file in files if "__pycache__" not in file.parts]
    if not files:
        raise UserError(f"{path}: no such file or folder.")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path.parent)} {file.stat().st_size}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
