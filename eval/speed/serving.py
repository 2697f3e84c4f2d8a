"""`vlm-sft-rl serve`: many clients at once against one at a time, on the pocket VLM that verifies itself.

The same pictures are described on both sides, and every answer must be the same, or the benchmark stops.
"""

import base64
import io
import json
import random
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

from bench import main

from vlm_sft_rl.pocket.render import render
from vlm_sft_rl.pocket.world import draw_scene


def requests_for(count: int) -> list[bytes]:
    """Bodies of requests to describe as many scenes."""
    rng, bodies = random.Random(0), []
    for number in range(count):
        buffer = io.BytesIO()
        render(draw_scene(rng, 0.5), number).save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": "Describe the image."},
        ]
        bodies.append(
            json.dumps({"model": "pocket", "messages": [{"role": "user", "content": content}]}).encode()
        )
    return bodies


def ask(address: str, body: bytes) -> str:
    request = urllib.request.Request(
        f"{address}/chat/completions", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        return json.loads(reply.read())["choices"][0]["message"]["content"]


def run(*, clients: int = 64, requests: int = 192, repeats: int = 3) -> dict:
    """Returns `{"ratios": {"one_over_many"}, "seconds": the quickest of each, "settings"}`."""
    command = [sys.executable, "-m", "vlm_sft_rl.cli", "serve", "pocket", "--port", "0"]
    command += ["--rows", str(clients), "--waiting", str(requests)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = server.stdout.readline().split()[3]
        bodies = requests_for(requests)
        ask(address, bodies[0])
        seconds: dict[str, list[float]] = {"one": [], "many": []}
        for number in range(repeats):
            answers = {}
            for side, workers in (("one", 1), ("many", clients))[:: 1 if number % 2 == 0 else -1]:
                with ThreadPoolExecutor(workers) as pool:
                    start = time.perf_counter()
                    answers[side] = list(pool.map(lambda body: ask(address, body), bodies))
                    seconds[side].append(time.perf_counter() - start)
            if answers["one"] != answers["many"]:
                raise AssertionError("an answer depends on who else was asking")
    finally:
        server.terminate()
        server.wait()
    best = {side: min(values) for side, values in seconds.items()}
    return {
        "ratios": {"one_over_many": round(best["one"] / best["many"], 3)},
        "seconds": best,
        "settings": {"clients": clients, "requests": requests, "repeats": repeats},
    }


if __name__ == "__main__":
    main(__file__, run)
