"""A server for a round's model (vLLM, SGLang, `transformers serve`, …): started, waited for, stopped; it ends with the run,
however that ends."""

import http.client
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from ..endpoint import EndpointClient
from ..errors import UserError
from .training import tail

POLL_SECONDS = 0.5
GRACE_SECONDS = 20


class ServedModel:
    """An OpenAI-compatible server as a child process, and a client for it.

    Args:
        command: how to start it; `{model}` is the checkpoint's folder, `{port}` a free port of this machine. The server
            must know the model by that folder's name or path, as vLLM and SGLang do by default.
        model: the checkpoint (a whole model: adapters are merged before).
        log: where its output goes.
        timeout: seconds until it must answer.

    Raises:
        UserError: it cannot be started, ended, or did not answer in time; the end of its output is quoted.
    """

    def __init__(self, command: str, model: str, log: Path, *, timeout: float, concurrency: int):
        self.port = _free_port()
        try:
            words = [
                w.replace("{model}", model).replace("{port}", str(self.port)) for w in shlex.split(command)
            ]
            if not words or shutil.which(words[0]) is None:
                raise FileNotFoundError("no such program")
            warden = [sys.executable, "-m", "vlm_sft_rl.self_training.warden", str(os.getpid())]
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "ab") as handle:
                self.process = subprocess.Popen(
                    [*warden, *words], stdout=handle, stderr=subprocess.STDOUT, start_new_session=True
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
        except OSError:
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
