"""What the machines of one training must have in common, checked before a weight is read."""

import os
import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object

from .errors import UserError, short

SEEN_WITHIN_SECONDS = 5.0  # a network file system may take a moment to show a new file to another machine


def several_machines() -> bool:
    """Whether the launcher started processes on other machines than this one."""
    return int(os.environ.get("WORLD_SIZE", 1)) > int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def check_machines(output_dir: str | Path, facts: Mapping[str, Any]) -> None:
    """Refuse a run over machines that differ in a fact or do not share the output folder; with one machine, nothing.

    Every process of the run calls it, once there is a process group, and all of them raise alike.

    Args:
        facts: what must be equal, by the name that a message gives it.

    Raises UserError: they differ; the message names the fact and the machines.
    """
    if not several_machines():
        return
    host = socket.gethostname()
    everywhere = gather_object([(host, dict(facts))])
    first_host, first = everywhere[0]
    for other_host, other in everywhere:
        for name in first:
            if first[name] != other[name]:
                raise UserError(
                    f"{name} differs between the machines of this run: {short(first[name], 100)} on {first_host}, "
                    f"{short(other[name], 100)} on {other_host}. Give the same command on all machines, over the same files."
                )
    folder, token = Path(output_dir), [f".machines.{secrets.token_hex(8)}"]
    broadcast_object_list(token)
    mark, is_first = folder / token[0], os.environ.get("RANK") == "0"
    if is_first:
        mark.touch()
    gather_object([host])  # now it is there
    try:
        blind = sorted({other for other, sees in gather_object([(host, _appears(mark))]) if not sees})
    finally:
        if is_first:
            mark.unlink(missing_ok=True)
    if blind:
        raise UserError(
            f"output_dir {str(output_dir)!r}: what {first_host} writes there cannot be seen on {', '.join(blind)}. "
            "Checkpoints are written by all machines and read by all: name a folder of a file system that they share."
        )


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + SEEN_WITHIN_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
