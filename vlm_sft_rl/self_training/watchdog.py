"""`python -m vlm_sft_rl.self_training.watchdog PARENT COMMAND…`: a server that ends with the run that started it, even by
SIGKILL. Otherwise it would keep the GPU's memory, and the same command could not go on."""

import os
import signal
import subprocess
import sys
import time

POLL_SECONDS = 0.5


def main(parent: int, command: list[str]) -> int:
    """Run `command` until it ends or process `parent` has gone; must lead a process group. Returns the status."""
    # whoever stops the group waits for this process: it has to outlive the server
    signal.signal(signal.SIGTERM, lambda *_: None)
    server = subprocess.Popen(command)
    while server.poll() is None:
        if os.getppid() != parent:
            os.killpg(0, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    return server.returncode if server.returncode >= 0 else 128 - server.returncode


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
