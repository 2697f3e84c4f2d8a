"""The file of skipped rows: one line a row, however many dataloader workers, ranks, epochs and restarts met it."""

import errno
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ..errors import RowError, UserError
from ..locks import lock_open

RECORD_START = b'{"id": '


class Rejects:
    """Rows that were left out of training, in a JSONL file of `{"id", "source", "kind", "reason"}`.

    The file itself is the only state that processes share. A process appends under a lock (`.NAME.lock` beside it), after
    it has read what others appended, so that no row comes twice; the kernel gives the lock back when its process ends,
    killed or not. A line is one write: once `add` has returned, it survives a kill.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._forget()

    def add(self, row: dict, error: RowError) -> int:
        """Record a row; returns how many rows the file has then, 0 when it had this one before.

        Raises UserError: the file cannot be written.
        """
        key = identity(row)
        if key in self._kinds:
            return 0
        record = {"id": row.get("id"), "source": key, "kind": error.kind, "reason": error.reason}
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked("ab+") as handle:
                if key in self._kinds:
                    return 0
                handle.truncate(self._read)  # what a full disk or a kill left of a line
                if handle.write(line) < len(line):
                    handle.truncate(self._read)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as problem:
            raise UserError(
                f"{self.path}: cannot record a skipped row ({problem.strerror or problem}). Free some disk space or set "
                "`rejects_file` to another place, then run the same command again."
            ) from problem
        self._read += len(line)
        self._last = line
        self._kinds[key] = error.kind
        return len(self._kinds)

    def counts(self) -> Counter:
        """Skipped rows by kind, of all processes."""
        try:
            with self._locked("rb"):
                pass
        except FileNotFoundError:
            self._forget()
        return Counter(self._kinds.values())

    def clear(self) -> None:
        """Begin anew. No other process may be adding. Raises UserError: the file is no file of skipped rows."""
        self.counts()
        self.path.unlink(missing_ok=True)
        self._forget()

    def summary(self) -> str:
        """`12 rows were skipped (9 too long, 3 missing image), see FILE`; empty when there is none."""
        counts = self.counts()
        if not counts:
            return ""
        n = counts.total()
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
        return f"{n} row{'s were' if n > 1 else ' was'} skipped ({kinds}), see {self.path}"

    @contextmanager
    def _locked(self, mode: str) -> Iterator[IO[bytes]]:
        """The open file while nobody else has it, after what others appended was read."""
        if mode == "rb" and not self.path.exists():
            raise FileNotFoundError(self.path)
        with open(self.path.with_name(f".{self.path.name}.lock"), "ab") as lock:
            lock_open(lock.fileno(), wait=True)
            with open(self.path, mode, buffering=0) as handle:
                self._catch_up(handle)
                yield handle

    def _catch_up(self, handle: IO[bytes]) -> None:
        handle.seek(self._read - len(self._last))
        if handle.read(len(self._last)) != self._last:
            self._forget()  # another process began anew
        handle.seek(self._read)
        text = handle.read()
        whole = text.rfind(b"\n") + 1
        for line in text[:whole].splitlines(keepends=True):
            try:
                record = json.loads(line)
                self._kinds.setdefault(record["source"], record["kind"])
                self._last = line
            except (ValueError, TypeError, KeyError) as error:
                raise self._foreign(line) from error
        self._read += whole
        # all that may stand behind the last whole line is one that was cut off
        if not (rest := text[whole:]).startswith(RECORD_START[: len(rest)]):
            raise self._foreign(rest)

    def _foreign(self, line: bytes) -> UserError:
        return UserError(
            f"{self.path}: holds a line that is no skipped row ({line[:80].decode(errors='replace')!r}). Move the "
            "file away, or set `rejects_file` to another place."
        )

    def _forget(self) -> None:
        self._read = 0  # bytes of the file that are known
        self._last = b""  # the line they end with
        self._kinds: dict[str, str] = {}  # identity of a row -> what was wrong with it


def identity(row: dict) -> str:
    """What tells a row from the others: its place in a file, else its id, else its content."""
    source = str(row.get("source") or "")
    # data sets have a `source` of their own ("coco"), which would make one row of all
    if source.startswith("row ") or source.rpartition(":")[2].isdigit():
        return source
    if row.get("id") is not None:
        return f"row {row['id']}"
    content = {name: value for name, value in row.items() if name not in ("images", "image")}
    text = json.dumps(content, default=lambda value: type(value).__name__)
    return f"row without id {hashlib.sha256(text.encode()).hexdigest()[:12]}"
