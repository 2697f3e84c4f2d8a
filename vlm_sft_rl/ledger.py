"""A file of paid answers by the hash of their request, so that nothing is asked, or paid for, twice."""

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError
from .io import append_jsonl, make_folder, writing
from .locks import lock_open
from .shapes import COUNT, fault

START = b'{"key": "'  # of every line
RECORD = {
    "key": str,
    "texts": [str],
    "finish_reasons?": [str],
    "prompt_tokens?": COUNT,
    "completion_tokens?": COUNT,
}
ABOUT_SERVER = {"key": str, "server": {"left_out": [str], "varies": bool}}


class Ledger:
    """A JSONL file of answers by the hash of their request: safe between threads, used by one process at a time.

    Only keys and offsets stand in memory; an answer is read back from the file when it is asked for.

    Args:
        path: the file; it and its folder are made when missing. A last line that a killed process left
            unfinished is cut off.

    Raises UserError: another process uses the ledger, a line in it is none of a ledger (nothing is changed then), or it
    cannot be written to.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock = threading.Lock()
        make_folder(self.path.parent)
        with writing(self.path):
            self._handle = open(self.path, "a+b")  # noqa: SIM115 - kept, with its lock, until close()
        try:
            if lock_open(self._handle.fileno()) is False:
                raise UserError(
                    f"{self.path}: another process is using this ledger. Wait for it, or give this run a ledger of its own."
                )
            self._offsets = self._read()
        except BaseException:
            self._handle.close()
            raise

    def _read(self) -> dict[str, int]:
        offsets: dict[str, int] = {}
        offset = 0
        self._handle.seek(0)
        for number, line in enumerate(self._handle, 1):
            if not line.endswith(b"\n") and line.startswith(START[: len(line)]):
                # a process killed while it appended: the answer is lost, the lines before it are not
                os.truncate(self.path, offset)
                break
            if line.strip():
                offsets[self._record(line, number)["key"]] = offset
            offset += len(line)
        return offsets

    def _record(self, line: bytes, number: int) -> dict:
        try:
            record = json.loads(line)
            about_server = isinstance(record, dict) and "server" in record
            if fault(record, ABOUT_SERVER if about_server else RECORD) is None:
                return record
        except (ValueError, RecursionError):
            pass
        raise UserError(
            f"{self.path}, line {number}: not a record of a ledger ({line[:60].decode(errors='replace')!r}). If this is "
            "a ledger, remove the line: its answer will be asked for again. If it is another file, name another ledger."
        )

    def get(self, key: str) -> dict | None:
        """The record stored under `key`, or None."""
        with self._lock:
            if key not in self._offsets:
                return None
            self._handle.seek(self._offsets[key])
            return json.loads(self._handle.readline())

    def answers(self) -> Iterator[dict]:
        """All answers that were paid for."""
        records = (self.get(key) for key in tuple(self._offsets))
        return (record for record in records if "texts" in record)

    def add(self, key: str, record: dict) -> None:
        """Store a record; it is on the disk when this returns."""
        with self._lock:
            offset = self.path.stat().st_size
            append_jsonl(self.path, [{"key": key, **record}])
            self._offsets[key] = offset

    def close(self) -> None:
        self._handle.close()
