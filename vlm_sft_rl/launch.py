"""Start work in fresh processes through `accelerate launch`; run as a module, `accelerate launch` without its tracebacks."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import psutil

from .errors import UserError, first_line
from .recipes import find, read_yaml

GRACE_SECONDS = 30
PARENT = "VLM_SFT_RL_PARENT"
# what accelerate and torchrun set for the processes that they start
LAUNCHED = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}
_POLL_SECONDS = 0.5


def module_command(
    module: str,
    words: Sequence[str],
    accelerate_config: str = "single_gpu",
    num_processes: int | None = None,
) -> list[str]:
    """The command line of `accelerate launch -m MODULE WORDS…`.

    Raises UserError: the accelerate config does not exist.
    """
    config, processes = _settings(accelerate_config, num_processes)
    command = [sys.executable, "-m", "vlm_sft_rl.launch", "--config_file"]
    command += [str(find("accelerate_configs", accelerate_config)), "--num_processes", str(processes)]
    if processes > 1 and config.get("distributed_type", "NO") == "NO":
        command.append(
            "--multi_gpu"
        )  # accelerate's name for all that its elastic launcher starts, CPUs included
    if processes > 1 and "main_process_port" not in config and config.get("num_machines", 1) == 1:
        command += ["--main_process_port", "0"]  # any free one: there may be other runs on this machine
    return [*command, "-m", module, *words]


def training_command(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    accelerate_config: str = "single_gpu",
    num_processes: int | None = None,
) -> list[str]:
    """The command line that `accelerate launch -m vlm_sft_rl.train --config RECIPE …` stands for.

    Raises UserError: the recipe or the accelerate config does not exist.
    """
    words = ["--config", str(find("recipes", str(recipe))), *overrides]
    return module_command("vlm_sft_rl.train", words, accelerate_config, num_processes)


def process_count(accelerate_config: str, num_processes: int | None = None) -> int:
    """How many processes a launch starts: as asked for, or as the accelerate config says.

    Raises UserError: no such config, or a number that is none.
    """
    return _settings(accelerate_config, num_processes)[1]


def _settings(accelerate_config: str, num_processes: int | None) -> tuple[dict, int]:
    """The settings of an accelerate config, and the number of processes."""
    path = find("accelerate_configs", accelerate_config)
    config = read_yaml(path)
    count = config.get("num_processes", 1) if num_processes is None else num_processes
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        where = path if num_processes is None else "--num-processes"
        raise UserError(f"{where}: `num_processes` is {count!r}, expected an integer >= 1.")
    return config, count


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
    """Let this process end when the one that ran it through `run_command`, or the launcher (accelerate's or torch's) that
    started it, has gone, even by SIGKILL: two runs must never write into one folder."""
    watched = {os.getppid()} if LAUNCHED & os.environ.keys() else set()
    if (parent := os.environ.get(PARENT, "")).isdigit():
        watched.add(int(parent))
    # a process id may be given to another one later
    started = {process: _start_of(process) for process in watched}

    def watch():
        while all(_start_of(process) == start for process, start in started.items()):
            time.sleep(_POLL_SECONDS)
        os._exit(143)

    if started:
        threading.Thread(target=watch, daemon=True).start()


def _start_of(process: int) -> float | None:
    """When a process was started; None where there is none, or it has ended and waits to be asked for its status."""
    try:
        known = psutil.Process(process)
        return None if known.status() == psutil.STATUS_ZOMBIE else known.create_time()
    except psutil.Error:
        return None


def main(words: Sequence[str] | None = None) -> int:
    """`accelerate launch WORDS…`, which says in one message what is wrong with its config; a child says itself why it
    failed. Returns the status."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    args = launch_command_parser().parse_args(words)
    end_with_parent()
    if read_yaml(args.config_file).get("use_cpu") is True:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # its elastic launcher does not hand it on
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(args)
    except ChildFailedError as error:
        return _failed(error.get_first_failure()[1].exitcode)
    except subprocess.CalledProcessError as error:
        return _failed(error.returncode)
    except Exception as error:  # each setting is refused in its own way
        print(f"Error: {args.config_file}: {first_line(error)}", file=sys.stderr)
        return 2
    return 0


def _failed(status: int) -> int:
    """Say what a child could not say itself; returns the launch's status."""
    if status < 0:
        print(
            f"Error: a process was ended by signal {-status} ({signal.Signals(-status).name}). If nobody sent it, the "
            "system had no memory left: see its log.",
            file=sys.stderr,
        )
    return 1


if __name__ == "__main__":
    sys.exit(main())
