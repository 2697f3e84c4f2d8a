"""Processes of the loop: training in a fresh one, and a server for a round's model (vLLM, SGLang)."""

import gc
import http.client
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from ..errors import UserError
from ..io import make_folder, write_text, writing
from ..launch import Machines, launch_settings, process_count, run_command, training_command
from ..runs import digest, model_digest, run_stage
from ..teacher import EndpointClient

METHODS = {"sft": "sft", "dpo": "reflection_dpo"}
LOG_LINES = 12  # of the child's output that an error quotes
POLL_SECONDS = 0.5
GRACE_SECONDS = 20


@dataclass
class Trainer:
    """Trains by `accelerate launch -m vlm_sft_rl.train`.

    Attributes:
        keys: objective (`sft`, `dpo`) -> the recipe's keys of its training.
        accelerate_config, num_processes, machines: as for `vlm-sft-rl train`; one machine.

    Raises UserError: processes and machines that do not fit together, or several machines.
    """

    keys: dict[str, dict[str, Any]]
    accelerate_config: str = "single_gpu"
    num_processes: int | None = None
    machines: Machines | None = None

    def __post_init__(self):
        settings = launch_settings(self.accelerate_config, self.num_processes, self.machines)
        if (count := settings["num_machines"]) > 1:
            raise UserError(
                f"self-training runs on one machine, not on {count}: one process draws, grades and builds the rows of every "
                "round, and nothing would start its samplers and trainings on the others. Give the command without "
                "--num-machines on one of them. Several can do one round's training, from the file that is there when it "
                "begins: `vlm-sft-rl train OUTPUT/round-1/train.yaml --num-machines …`; then give this command again."
            )

    @property
    def processes(self) -> int:
        return process_count(self.accelerate_config, self.num_processes)

    @property
    def sharding(self) -> str | None:
        """What cuts the weights themselves over the processes, by the accelerate config: `ZeRO-3`, `FSDP` or nothing."""
        settings = launch_settings(self.accelerate_config, self.num_processes, self.machines)
        if (settings.get("deepspeed_config") or {}).get("zero_stage") == 3:
            return "ZeRO-3"
        return "FSDP" if settings.get("distributed_type") == "FSDP" else None

    def train(self, objective: str, folder: Path, rows: Path, start: str, console: Console) -> None:
        """Train `start` on `rows` into `folder`, or go on from its last checkpoint, or do nothing if that is done.

        Raises UserError: the child failed; its last lines are quoted and its whole output is in a log beside the folder.
        """
        begin = self.whole_model(start, folder.parent)
        recipe = {"method": METHODS[objective], **self.keys[objective]}
        manifest = {
            "stage": objective,
            # a run that was moved or copied is still the same run
            "recipe": {key: value for key, value in recipe.items() if key != "image_root"},
            "rows": digest(rows),
            "start": model_digest(begin) if Path(begin).is_dir() else begin,
        }
        recipe |= {
            "model_name_or_path": begin,
            "train_file": str(rows.resolve()),
            "output_dir": str(folder.resolve()),
        }
        path = folder.parent / f"{folder.name}.yaml"
        run_stage(folder, manifest, lambda: self._launch(path, recipe, folder, console))

    def _launch(self, path: Path, recipe: dict, folder: Path, console: Console) -> None:
        write_text(path, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
        log = folder.parent / f"{folder.name}.log"
        command = training_command(path, [], self.accelerate_config, self.num_processes)
        with (
            console.status(f"  training {folder} (its output: {log})"),
            writing(log),
            open(log, "ab") as handle,
        ):
            status = run_command(command, handle)
        if status:
            raise UserError(
                f"training {folder} failed with status {status}:\n{tail(log)}\n(all of it: {log})"
            )
        if not any(folder.glob("*.safetensors")):
            raise UserError(f"training {folder} ended without weights there. Its output is in {log}.")

    def whole_model(self, model: str, folder: Path) -> str:
        """The model itself, or an adapter merged into its base: DPO needs a reference on the disk, and an adapter on an
        adapter would be trained against the wrong one."""
        import torch

        from ..models.checkpoints import merge
        from ..models.load import is_adapter

        if not Path(model).is_dir() or not is_adapter(model):
            return model
        adapter = Path(model)
        stage = folder / f"merged-{adapter.parent.name}-{adapter.name}"
        target = stage / "model"

        def fold() -> None:
            if not target.exists():  # it appears only when it is whole
                merge(adapter, target)
                # the training or the server that comes next needs the GPU's memory; torch would keep it for this process
                gc.collect()
                torch.cuda.empty_cache()

        run_stage(stage, {"stage": "merge", "adapter": model_digest(model)}, fold)
        return str(target.resolve())


def tail(log: Path) -> str:
    """The last lines of a log that say something: progress bars are left out."""
    text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    lines = [line for line in text.splitlines() if line.strip() and "it/s" not in line and "s/it" not in line]
    errors = [i for i, line in enumerate(lines) if line.startswith("Error:")]
    return "\n".join(lines[errors[-1] :] if errors else lines[-LOG_LINES:])


class ServedModel:
    """An OpenAI-compatible server as a child process, and a client for it.

    Args:
        command: how to start it; `{model}` is the checkpoint's folder, `{port}` a free port of this machine. The server
            must know the model by that folder's name or path, as vLLM and SGLang do by default.
        model: the checkpoint (a whole model: adapters are merged before).
        log: where its output goes.
        timeout: seconds until it must answer.

    Raises UserError: it cannot be started, ended, or did not answer in time; the end of its output is quoted.
    """

    def __init__(self, command: str, model: str, log: Path, *, timeout: float, concurrency: int):
        self.port = _free_port()
        try:
            words = [
                w.replace("{model}", model).replace("{port}", str(self.port)) for w in shlex.split(command)
            ]
            if not words or shutil.which(words[0]) is None:
                raise FileNotFoundError("no such program")
            watchdog = [sys.executable, "-m", "vlm_sft_rl.self_training.watchdog", str(os.getpid())]
            make_folder(log.parent)
            with writing(log), open(log, "ab") as handle:
                self.process = subprocess.Popen(
                    [*watchdog, *words], stdout=handle, stderr=subprocess.STDOUT, start_new_session=True
                )
        except (OSError, ValueError) as error:
            raise UserError(
                f"`serve`: {command!r} cannot be started ({error}). Correct the command."
            ) from error
        try:
            self._wait(log, timeout)
            self.client = EndpointClient(f"http://127.0.0.1:{self.port}/v1", model, concurrency=concurrency)
        except BaseException:
            self.stop()
            raise

    def _wait(self, log: Path, timeout: float) -> None:
        started = time.monotonic()
        while not self._answers():
            if self.process.poll() is not None:
                raise UserError(
                    f"`serve`: the server ended with status {self.process.returncode}:\n{tail(log)}"
                )
            if time.monotonic() - started > timeout:
                raise UserError(
                    f"`serve`: no answer on port {self.port} within {timeout:.0f} s (`serve_timeout`). Does the command use "
                    f"{{port}}? Its output: {log}\n{tail(log)}"
                )
            time.sleep(POLL_SECONDS)

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/v1/models")
            return connection.getresponse().status < 500
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def stop(self) -> None:
        """End the server and everything it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
