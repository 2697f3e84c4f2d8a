"""Start work in fresh processes through `accelerate launch`."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from .recipes import find, read_yaml

GRACE_SECONDS = 30
PARENT = "VLM_SFT_RL_PARENT"
_POLL_SECONDS = 0.5


def module_command(
    module: str,
    words: Sequence[str],
    accelerate_config: str = "single_gpu",
    num_processes: int | None = None,
) -> list[str]:
    """The command line of `accelerate launch -m MODULE WORDS…`.

    Raises:
        UserError: the accelerate config does not exist.
    """
    config = find("accelerate_configs", accelerate_config)
    processes = process_count(accelerate_config, num_processes)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--num_processes", str(processes)]
    if processes == 1:
        command.append(
            "--quiet"
        )  # the module's own message is enough; the launcher's traceback would bury it
    return [*command, "-m", module, *words]


def training_command(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    accelerate_config: str = "single_gpu",
    num_processes: int | None = None,
) -> list[str]:
    """The command line that `accelerate launch -m vlm_sft_rl.train --config RECIPE …` stands for.

    Raises:
        UserError: the recipe or the accelerate config does not exist.
    """
    words = ["--config", str(find("recipes", str(recipe))), *overrides]
    return module_command("vlm_sft_rl.train", words, accelerate_config, num_processes)


def process_count(accelerate_config: str, num_processes: int | None = None) -> int:
    """How many processes a launch starts: as asked for, or as the accelerate config says."""
    return num_processes or read_yaml(find("accelerate_configs", accelerate_config)).get("num_processes", 1)


def launch_training(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    accelerate_config: str = "single_gpu",
    num_processes: int | None = None,
) -> int:
    """Run the command in the foreground; 0, or 2 when it failed. Its processes end with this one, however it ends."""
    return 2 if run_command(training_command(recipe, overrides, accelerate_config, num_processes)) else 0


def run_command(command: Sequence[str], log: IO | None = None) -> int:
    """Run a command in the foreground and return its status; output goes to `log` or to this process's own.

    Its processes end with this one: on SIGTERM they are stopped; after SIGKILL those that called `end_with_parent` end by
    themselves.
    """
    process = subprocess.Popen(
        command,
        start_new_session=True,
        env={**os.environ, PARENT: str(os.getpid())},
        stdout=log,
        stderr=None if log is None else subprocess.STDOUT,
    )

    def stop(number, frame):
        raise SystemExit(128 + number)

    main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, stop) if main else None
    try:
        return process.wait()
    finally:
        if main:
            signal.signal(signal.SIGTERM, previous)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:  # a rank that waits for a dead one does not listen
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def end_with_parent() -> None:
    """Let this process end when the one that ran it through `run_command` has gone, even by SIGKILL: two runs must never
    write into one folder."""
    parent = os.environ.get(PARENT, "")
    if not parent.isdigit():
        return

    def watch():
        while True:
            try:
                os.kill(int(parent), 0)
            except ProcessLookupError:
                os._exit(143)
            except PermissionError:
                return
            time.sleep(_POLL_SECONDS)

    threading.Thread(target=watch, daemon=True).start()
