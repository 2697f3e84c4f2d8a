"""Start work in fresh processes through `accelerate launch`; run as a module, `accelerate launch` without its tracebacks."""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from .errors import UserError, first_line
from .recipes import find, read_yaml
from .settings import Checked, setting

GRACE_SECONDS = 30
PARENT = "VLM_SFT_RL_PARENT"
# what accelerate and torchrun set for the processes that they start
LAUNCHED = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}
_POLL_SECONDS = 0.5
# how warnings begin that say nothing about a run: PEFT asks transformers for a property by its old name; checkpoints
# written within one second are put in order by their numbers
HARMLESS = ("`is_gradient_checkpointing` is deprecated", "mtime may not be reliable")
HARMLESS_LOGGERS = ("transformers.trainer_utils",)
PORT = 29500  # torch's own


@dataclass(frozen=True)
class Machines(Checked):
    """The machines of a launch and this one's place among them; None leaves it to the accelerate config."""

    num_machines: int | None = setting(
        None, "Machines that train together; give this command on each. Default: 1.", least=1
    )
    machine_rank: int | None = setting(None, "Number of this machine, from 0.", least=0)
    main_process_ip: str | None = setting(None, "Address of machine 0 in the network of the machines.")
    main_process_port: int | None = setting(
        None, f"Free port of machine 0, the same on all machines. Default: {PORT}."
    )


def module_command(
    module: str,
    words: Sequence[str],
    accelerate_config: str = "single_gpu",
    num_processes: int | None = None,
    machines: Machines | None = None,
) -> list[str]:
    """The command line of `accelerate launch -m MODULE WORDS…`.

    Raises UserError: the accelerate config does not exist, or processes and machines do not fit together; on machine 0,
    another process has the port; on the others, machine 0's name is unknown.
    """
    settings = launch_settings(accelerate_config, num_processes, machines)
    command = [sys.executable, "-m", "vlm_sft_rl.launch", "--config_file"]
    processes = settings["num_processes"]
    command += [str(find("accelerate_configs", accelerate_config)), "--num_processes", str(processes)]
    if processes > 1 and settings.get("distributed_type", "NO") == "NO":
        command.append(
            "--multi_gpu"
        )  # accelerate's name for all that its elastic launcher starts, CPUs included
    if settings["num_machines"] > 1:
        _check_meeting(settings)
        for name in asdict(Machines()):
            command += [f"--{name}", str(settings[name])]
    elif processes > 1:
        # without a port any free one: there may be other runs on this machine
        command += ["--main_process_port", str(settings.get("main_process_port") or 0)]
    return [*command, "-m", module, *words]


def training_command(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    accelerate_config: str = "single_gpu",
    num_processes: int | None = None,
    machines: Machines | None = None,
) -> list[str]:
    """The command line that `accelerate launch -m vlm_sft_rl.train --config RECIPE …` stands for.

    Raises UserError: the recipe does not exist, or as `module_command`.
    """
    words = ["--config", str(find("recipes", str(recipe))), *overrides]
    return module_command("vlm_sft_rl.train", words, accelerate_config, num_processes, machines)


def process_count(
    accelerate_config: str, num_processes: int | None = None, machines: Machines | None = None
) -> int:
    """How many processes a launch starts, on all machines together: as asked for, or as the accelerate config says.

    Raises UserError: no such config, a number that is none, or machines that do not fit.
    """
    return launch_settings(accelerate_config, num_processes, machines)["num_processes"]


def launch_settings(
    accelerate_config: str, num_processes: int | None, machines: Machines | None
) -> dict[str, Any]:
    """An accelerate config with what the command line says in its place."""
    path, given = find("accelerate_configs", accelerate_config), asdict(machines or Machines())
    given = {k: v for k, v in {"num_processes": num_processes, **given}.items() if v is not None}
    settings = {"num_processes": 1, "num_machines": 1, "machine_rank": 0, **read_yaml(path), **given}

    def where(name: str) -> str:
        return f"--{name.replace('_', '-')}" if name in given else str(path)

    for name, least in (("num_processes", 1), ("num_machines", 1), ("machine_rank", 0)):
        value = settings[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{where(name)}: `{name}` is {value!r}, expected an integer >= {least}.")
    count, rank, processes = (settings[name] for name in ("num_machines", "machine_rank", "num_processes"))
    if count == 1:
        if stray := [name for name in ("machine_rank", "main_process_ip") if given.get(name)]:
            raise UserError(
                f"{where(stray[0])} is for several machines, and there is one. Give --num-machines as well."
            )
        return settings
    if "num_machines" in given and "machine_rank" not in given:
        raise UserError(
            f"--num-machines is {count}, and which of them this one is has to be said: give --machine-rank, on each machine "
            f"another number from 0 to {count - 1}."
        )
    if rank >= count:
        raise UserError(
            f"{where('machine_rank')}: `machine_rank` is {rank}, and {count} machines have the numbers 0 to {count - 1}."
        )
    if processes % count:
        raise UserError(
            f"{where('num_processes')}: {processes} processes cannot be shared by {count} machines. `num_processes` counts "
            "those of all machines together, and each starts as many as the others: give --num-processes as a multiple of "
            f"{count}."
        )
    if not isinstance(settings.get("main_process_ip"), str):
        raise UserError(
            f"--main-process-ip is missing: {count} machines meet at the address of machine 0. Give it on each of them, as "
            "the others reach it."
        )
    if (port := settings.get("main_process_port")) is None:
        settings["main_process_port"] = PORT
    elif isinstance(port, bool) or not isinstance(port, int) or not 0 < port < 65536:
        raise UserError(
            f"{where('main_process_port')}: `main_process_port` is {port!r}; {count} machines meet at a port from 1 to "
            "65535 that all of them know."
        )
    return settings


def _check_meeting(settings: dict[str, Any]) -> None:
    """Raises UserError: machine 0's port is taken, or its name is unknown here."""
    address, port = settings["main_process_ip"], settings["main_process_port"]
    try:
        socket.getaddrinfo(address, port)
    except OSError as error:
        raise UserError(
            f"main_process_ip {address!r}: this machine knows no such address ({error.strerror}). Give machine 0's as the "
            "others reach it."
        ) from error
    if settings["machine_rank"] > 0:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does: a port just left is free
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"main_process_port {port}: cannot be used here ({error.strerror}). End what has it, or give another "
                "--main-process-port on all machines."
            ) from error


def launch_training(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    accelerate_config: str = "single_gpu",
    num_processes: int | None = None,
    machines: Machines | None = None,
) -> int:
    """Run the command in the foreground; 0, or 2 when it failed. Its processes end with this one, however it ends."""
    command = training_command(recipe, overrides, accelerate_config, num_processes, machines)
    return 2 if run_command(command) else 0


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


def leave_out_the_harmless() -> None:
    """Keep warnings out of a log that are about nothing."""
    for name in HARMLESS_LOGGERS:
        logging.getLogger(name).addFilter(_is_worth_reading)
    for text in HARMLESS:
        warnings.filterwarnings("ignore", message=re.escape(text))
    # on a CPU it recommends a package for inference each time it is imported
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(HARMLESS)


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
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    args = launch_command_parser().parse_args(words)
    end_with_parent()
    if read_yaml(args.config_file).get("use_cpu") is True:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # its elastic launcher does not hand it on
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    meeting = f"{args.main_process_ip}:{args.main_process_port}"
    if (count := args.num_machines or 1) > 1:
        does = "joins" if args.machine_rank else "waits for the others at"
        print(
            f"Machine {args.machine_rank} of 0 to {count - 1} {does} {meeting}.", file=sys.stderr, flush=True
        )
    try:
        launch_command(args)
    except ChildFailedError as error:
        return _failed(error.get_first_failure()[1].exitcode)
    except subprocess.CalledProcessError as error:
        return _failed(error.returncode)
    except DistError as error:
        print(
            f"Error: the machines did not meet at {meeting} ({first_line(error)}). Start all of them within ten minutes, "
            "each with another --machine-rank, and let nothing between them close the way.",
            file=sys.stderr,
        )
        return 2
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
