"""What a graphics card has to say, in one command of at most eight minutes: training steps of every recipe at the published
shapes, packing, decoding and engines, all with random weights.

    python eval/speed/gpu.py --json gpu.json [--wheels DIR]                  on the card
    python eval/speed/gpu.py --json cpu.json --scale 0.1 --device cpu        a rehearsal without one

Each part runs in a process of its own and has its own share of the time; the file is written anew after every item, so a
stop at any moment keeps what was done. A part that ends too late, or an item that fails, is in the file with the reason.
Nothing is downloaded. `gpu_parts.py` has the parts.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

# seconds of the default 480
SHARES = {"steps": 230, "packing": 80, "decoding": 90, "engines": 70}
SPARE = 10
CHILD = Path(__file__).with_name("gpu_parts.py")


def main() -> None:
    command = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def option(name: str, help: str, **more) -> None:
        command.add_argument(name, help=help, **more)

    option("--json", "the figures, written anew after every item", type=Path, required=True, metavar="FILE")
    option("--seconds", "for everything (default 480)", type=float, default=480)
    option(
        "--scale", "of the models' width, depth and vocabulary, and of the batches", type=float, default=1.0
    )
    option("--device", "default cuda", choices=("cuda", "cpu"), default="cuda")
    option("--parts", ", ".join(SHARES), nargs="+", choices=SHARES, default=list(SHARES), metavar="PART")
    option("--recipes", "for steps: these alone", nargs="+", metavar="NAME")
    option("--wheels", "install the wheels in here for this run alone", type=Path, metavar="DIR")
    options = command.parse_args()
    with tempfile.TemporaryDirectory() as site:
        if options.wheels is not None:
            install(options.wheels, site)
        places = (site, str(CHILD.parents[2]), os.environ.get("PYTHONPATH", ""))
        run(options, {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))})


def install(wheels: Path, site: str) -> None:
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        sys.exit(
            f"Error: {wheels}: there are no wheels. Fill it with `pip download --no-deps -d {wheels} NAME==VERSION …`."
        )
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--target",
        site,
    ]
    if subprocess.run([*pip, *files]).returncode:
        sys.exit(f"Error: the wheels of {wheels} cannot be installed; pip says why above.")


def run(options: argparse.Namespace, environment: dict[str, str]) -> None:
    """Run the parts and keep the file up to date."""
    started = time.monotonic()
    result = {"benchmark": "gpu", "scale": options.scale, "device": options.device, "parts": {}}
    shares = {part: SHARES[part] for part in options.parts}
    for number, part in enumerate(options.parts):
        # what the parts before did not use is for those that come
        left = options.seconds - (time.monotonic() - started) - SPARE
        budget = left * shares[part] / sum(shares[name] for name in options.parts[number:])
        result["parts"][part] = record = {
            "budget_s": round(budget, 1),
            "items": {},
            "left_out": None,
            "ended": False,
        }
        write(options.json, result)
        words = [part, "--budget", f"{budget:.1f}", "--scale", str(options.scale), "--device", options.device]
        words += ["--recipes", *options.recipes] if options.recipes else []
        begun, planned = time.monotonic(), []
        with subprocess.Popen(
            [sys.executable, str(CHILD), *words], env=environment, stdout=subprocess.PIPE, text=True
        ) as child:
            killer = threading.Timer(budget, child.kill)
            killer.start()
            for line in child.stdout:
                message = json.loads(line)
                if "name" in message:
                    record["items"][message["name"]] = message["figures"]
                else:
                    result |= message["environment"]
                    planned = message["planned"]
                record["left_out"] = [name for name in planned if name not in record["items"]]
                print(line, end="", flush=True)
                write(options.json, result)
            status = child.wait()
            killer.cancel()
        record |= {"ended": status == 0, "seconds": round(time.monotonic() - begun, 1)}
        if status:
            over = status == -signal.SIGKILL
            record["reason"] = "its time was over" if over else f"status {status}; the message is above"
        write(options.json, result)


def write(path: Path, result: dict) -> None:
    """Replace the file at once: a reader, or a stop, never meets half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(result, indent=1))
    temporary.replace(path)


if __name__ == "__main__":
    main()
