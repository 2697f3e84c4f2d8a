"""Start a training run in a fresh process through `accelerate launch`."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .recipes import find, read_yaml

GRACE_SECONDS = 30


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
    config = find("accelerate_configs", accelerate_config)
    processes = process_count(accelerate_config, num_processes)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--num_processes", str(processes)]
    if processes == 1:
        command.append(
            "--quiet"
        )  # the trainer's own message is enough; the launcher's traceback would bury it
    return [*command, "-m", "vlm_sft_rl.train", "--config", str(find("recipes", str(recipe))), *overrides]


def process_count(accelerate_config: str, num_processes: int | None = None) -> int:
    """How many processes a launch starts: as asked for, or as the accelerate config says."""
    return num_processes or read_yaml(find("accelerate_configs", accelerate_config)).get("num_processes", 1)


def launch_training(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    accelerate_config: str = "single_gpu",
    num_processes: int | None = None,
) -> int:
    """Run the command in the foreground; 0, or 2 when it failed. Its processes end with this one, also on SIGTERM."""
    command = training_command(recipe, overrides, accelerate_config, num_processes)
    process = subprocess.Popen(command, start_new_session=True)

    def stop(number, frame):
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        return 2 if process.wait() else 0
    finally:
        signal.signal(signal.SIGTERM, previous)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:  # a rank that waits for a dead one does not listen
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
