"""One process at a time in an output folder, or on an output file: the system holds the lock and drops it with its process,
however that ends."""

import fcntl
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from weakref import WeakValueDictionary

from .errors import SECRET_OPTION, UserError

LOCK_FILE = ".lock"
GRACE_SECONDS = 2.0  # processes of a run that was killed need a moment to notice
_POLL_SECONDS = 0.1
_locks: "WeakValueDictionary[str, Lock]" = WeakValueDictionary()

logger = logging.getLogger(__name__)


def lock_open(handle: int, *, wait: bool = False) -> bool | None:
    """Lock an open file or folder until it is closed: False where another process has it, None where the file system has no
    locks.

    Args:
        wait: until no other process has it.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # some network file systems
        return None
    return True


class Lock:
    """The right of this process to write to a folder or a file; taken when made, until `release` or the process's end.

    Of the processes that one launcher started (`RANK`) the first holds it for all. Taken again by the same process it is
    shared.

    Args:
        path: a folder, which is made; or with `is_file` a file.
        alone: of such processes, too, each takes it for itself.

    Raises UserError: another process holds it (the message says which), or nothing can be written there.
    """

    def __init__(self, path: str | Path, *, is_file: bool = False, alone: bool = False):
        self.path = Path(path)
        place = self.path.with_name(f".{self.path.name}{LOCK_FILE}") if is_file else self.path / LOCK_FILE
        self._place, self._handle = place, None
        self._shared = _locks.get(key := os.path.abspath(place))
        if self._shared is not None or (os.environ.get("RANK", "0") != "0" and not alone):
            return
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            self._handle = self._take()
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written to ({error.strerror}). Choose another place."
            ) from error
        if self._handle is not None:
            _locks[key] = self

    def _take(self) -> int | None:
        """The descriptor that holds the lock; None where the file system has no locks."""
        deadline = time.monotonic() + GRACE_SECONDS
        while True:
            handle = os.open(self._place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            is_taken = False
            try:
                is_locked = lock_open(handle)
                if is_locked is None:
                    logger.warning(
                        "%s: this file system has no locks. Let no second run write there.", self.path
                    )
                    return None
                if is_locked:
                    self._warn_of_other_machine(os.pread(handle, 4096, 0))
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, json.dumps(_this_process()).encode(), 0)
                    # whoever had it before has removed the file: another process may hold a new one
                    if is_taken := _is_at(handle, self._place):
                        return handle
                elif time.monotonic() > deadline:
                    raise UserError(
                        f"{self.path}: {_described(os.pread(handle, 4096, 0))} is writing there, and two would spoil each "
                        "other's work. Wait until it has ended, or choose another place."
                    )
                else:
                    time.sleep(_POLL_SECONDS)
            finally:
                if not is_taken:
                    os.close(handle)

    def _warn_of_other_machine(self, content: bytes) -> None:
        """Some network file systems keep locks to one machine."""
        holder = _holder(content)
        if holder is not None and holder["host"] != socket.gethostname():
            logger.warning(
                "%s: %s wrote there and was killed, or still does where this file system does not share locks between "
                "machines: then stop one of the two.",
                self.path,
                _described(content),
            )

    def release(self) -> None:
        """Let others write; nothing where the lock was shared."""
        if self._handle is None:
            return
        handle, self._handle = self._handle, None
        _locks.pop(os.path.abspath(self._place), None)
        self._place.unlink(missing_ok=True)
        os.close(handle)

    __del__ = release


@contextmanager
def sole_use(path: str | Path, *, is_file: bool = False) -> Iterator[None]:
    """Hold the lock of a folder or a file while the block runs, see `Lock`."""
    lock = Lock(path, is_file=is_file)
    try:
        yield
    finally:
        lock.release()


def _is_at(handle: int, place: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(place))
    except FileNotFoundError:
        return False


def _this_process() -> dict:
    command = SECRET_OPTION.sub(r"\1 ***", " ".join(sys.argv))[:500]
    return {"pid": os.getpid(), "host": socket.gethostname(), "command": command}


def _holder(content: bytes) -> dict | None:
    """What a lock file says of its process; None where it is no lock file of ours."""
    try:
        about = json.loads(content)
    except (ValueError, RecursionError):
        return None
    ours = isinstance(about, dict) and about.keys() == {"pid", "host", "command"}
    return about if ours else None


def _described(content: bytes) -> str:
    about = _holder(content)
    return f"process {about['pid']} on {about['host']} ({about['command']})" if about else "another process"


def remove_stale(folder: Path) -> None:
    """Remove the lock files in a folder that processes of this machine left when they were killed."""
    for place in folder.glob(f".*{LOCK_FILE}"):
        with suppress(OSError):
            handle = os.open(place, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                holder = _holder(os.pread(handle, 4096, 0))
                here = holder is not None and holder["host"] == socket.gethostname()
                if here and lock_open(handle) and _is_at(handle, place):
                    place.unlink()
            finally:
                os.close(handle)


def _forget() -> None:
    """A forked child (a data loader's worker) must not keep the lock of a parent that was killed."""
    for lock in list(_locks.values()):
        if lock._handle is not None:
            os.close(lock._handle)
            lock._handle = None
    _locks.clear()


os.register_at_fork(after_in_child=_forget)
