"""The file of skipped rows: one line a row, however many dataloader workers, ranks, epochs and restarts met it."""

import errno
import hashlib
import json
import os
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from ..errors import RowError, UserError

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None

RECORD_START = b'{"id": '


class Rejects:
    """Rows that were left out of training, in a JSONL file of `{"id", "source", "kind", "reason"}`.

    The file itself is the only state that processes share. A process appends under a kernel lock on the file, after
    it has read what others appended, so that no row comes twice; the lock goes with its process, so a killed one
    leaves none behind. A line is one write: once `add` has returned, it survives a kill. Where a file system has no
    locks, a row met by two processes in the same instant may stand there twice; it is counted once all the same.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._read = 0  # bytes of the file that `_kinds` knows
        self._last = b""  # the line they end with
        self._kinds: dict[str, str] = {}
        self._alone = False  # whether the lock is held

    def add(self, row: dict, error: RowError) -> int:
        """Record a row; returns how many rows the file has then, 0 when it had this one before.

        Raises:
            UserError: the file cannot be written.
        """
        key = identity(row)
        if key in self._kinds:
            return 0
        record = {"id": row.get("id"), "source": key, "kind": error.kind, "reason": error.reason}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked() as handle:
                self._catch_up(handle)
                if key in self._kinds:
                    return 0
                self._append(handle, json.dumps(record, ensure_ascii=False).encode() + b"\n")
        except OSError as problem:
            raise UserError(
                f"{self.path}: cannot record a skipped row ({problem.strerror or problem}). Free some disk space or set "
                "`rejects_file` to another place, then run the same command again."
            ) from problem
        self._kinds[key] = error.kind
        return len(self._kinds)

    def counts(self) -> Counter:
        """Skipped rows by kind, of all processes."""
        try:
            with self._locked(create=False) as handle:
                self._catch_up(handle)
        except FileNotFoundError:
            self._forget()
        return Counter(self._kinds.values())

    def clear(self) -> None:
        """Begin anew. No other process may be adding.

        Raises:
            UserError: the file is no file of skipped rows.
        """
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
    def _locked(self, create: bool = True):
        flags = os.O_RDWR | os.O_APPEND | (os.O_CREAT if create else 0)
        handle = os.open(self.path, flags, 0o644)
        try:
            self._alone = _lock(handle)
            yield handle
        finally:
            os.close(handle)

    def _catch_up(self, handle: int) -> None:
        if os.pread(handle, len(self._last), self._read - len(self._last)) != self._last:
            self._forget()  # another process began anew
        text = os.pread(handle, os.fstat(handle).st_size - self._read, self._read)
        whole = text.rfind(b"\n") + 1
        for line in text[:whole].splitlines(keepends=True):
            try:
                record = json.loads(line)
                self._kinds.setdefault(record["source"], record["kind"])
                self._last = line
            except (ValueError, TypeError, KeyError) as error:
                raise self._foreign(line) from error
        self._read += whole
        # all that may stand behind the last whole line is one that a full disk cut off
        if not (rest := text[whole:]).startswith(RECORD_START[: len(rest)]):
            raise self._foreign(rest)

    def _foreign(self, line: bytes) -> UserError:
        return UserError(
            f"{self.path}: holds a line that is no skipped row ({line[:80].decode(errors='replace')!r}). Move the "
            "file away, or set `rejects_file` to another place."
        )

    def _append(self, handle: int, line: bytes) -> None:
        self._cut(handle)
        done = os.write(handle, line)
        if done < len(line):
            self._cut(handle)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._read += len(line)
        self._last = line

    def _cut(self, handle: int) -> None:
        """Remove what a full disk left of a line; without a lock it could be another process's that is being written."""
        if self._alone and os.fstat(handle).st_size > self._read:
            os.ftruncate(handle, self._read)

    def _forget(self) -> None:
        self._read, self._last, self._kinds = 0, b"", {}


def _lock(handle: int) -> bool:
    """Wait for the kernel's lock on a file; False where there are none."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def identity(row: dict) -> str:
    """What tells a row from the others: its place in a file, else its id, else its content."""
    if row.get("source"):
        return str(row["source"])
    if row.get("id") is not None:
        return f"row {row['id']}"
    content = json.dumps({k: v for k, v in row.items() if k not in ("images", "image")}, default=_kind)
    return f"row without id {hashlib.sha256(content.encode()).hexdigest()[:12]}"


def _kind(value) -> str:
    return type(value).__name__
