"""Answers that were paid for, one JSON line each, found again by the hash of their request."""

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from ..io import append_jsonl


class Ledger:
    """A JSONL file of answers by key: appended to line by line, safe between threads, held by one process.

    Only keys and offsets stand in memory; an answer is read back from the file when it is asked for.

    Args:
        path: the file; it and its folder are made when missing. A last line that a killed process left
            unfinished is cut off.

    Raises:
        UserError: another process holds the ledger, a line in it is damaged, or it cannot be written to.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock = threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = open(self.path, "a+b")  # noqa: SIM115 - held, with its lock, until close()
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be opened for writing ({error.strerror}). Choose another ledger file."
            ) from error
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._handle.close()
            raise UserError(
                f"{self.path}: another process is using this ledger. Wait for it, or give this run a ledger of its own."
            ) from error
        self._offsets = dict(self._scan())

    def __len__(self) -> int:
        return len(self._offsets)

    def __contains__(self, key: str) -> bool:
        return key in self._offsets

    def get(self, key: str) -> dict | None:
        """The record stored under `key`, or None."""
        with self._lock:
            if key not in self._offsets:
                return None
            self._handle.seek(self._offsets[key])
            return json.loads(self._handle.readline())

    def add(self, key: str, record: dict) -> None:
        """Store a record; it is on the disk when this returns."""
        with self._lock:
            offset = self.path.stat().st_size
            append_jsonl(self.path, [{"key": key, **record}])
            self._offsets[key] = offset

    def records(self) -> Iterator[dict]:
        """Every record, in the order in which the keys came."""
        for key in list(self._offsets):
            yield self.get(key)

    def close(self) -> None:
        self._handle.close()

    def _scan(self) -> Iterator[tuple[str, int]]:
        self._handle.seek(0)
        offset = 0
        for number, line in enumerate(self._handle, 1):
            if not line.endswith(b"\n"):
                # a process killed while it appended: the answer is lost, the lines before it are not
                os.truncate(self.path, offset)
                return
            if line.strip():
                try:
                    yield json.loads(line)["key"], offset
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(
                        f"{self.path}, line {number}: not a record of a ledger. Remove the line; its answer will be "
                        "asked for again."
                    ) from error
            offset += len(line)
