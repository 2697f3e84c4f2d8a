"""A process that may write small files only: what a full disk or a quota does, met by the real libraries."""

import os
import resource
import signal
import subprocess
import sys

CODE = """
import runpy, sys
from little_room import limit
limit(int(sys.argv.pop(1)))
sys.argv = ["vlm-sft-rl", *sys.argv[1:]]
runpy.run_module("vlm_sft_rl.cli.app", run_name="__main__")
"""


def limit(size: int) -> None:
    """From now on a write beyond `size` bytes of a file fails with an error, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def run_with_little_room(size: int, *words: str) -> subprocess.CompletedProcess:
    """`vlm-sft-rl WORDS` with files of at most `size` bytes."""
    return subprocess.run(
        [sys.executable, "-c", CODE, str(size), *words],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
