import json
import os
import subprocess
import sys
import time

import loops
import pytest

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.self_train import self_train
from vlm_sft_rl.self_training.processes import ServedModel

SERVER = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    def send(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def do_GET(self):
        self.send({"data": [{"id": sys.argv[1]}]})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        texts = [str(1 + k % 2) for k in range(body.get("n", 1))]
        choices = [{"index": i, "message": {"role": "assistant", "content": t}} for i, t in enumerate(texts)]
        if "FORBIDDEN" in str(body):
            choices = [{"message": {"content": None, "refusal": "no"}}]
        self.send({"model": body["model"], "choices": choices})
    def log_message(self, *args):
        pass

print("serving", sys.argv[1], "as", os.getpid(), flush=True)
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
"""


@pytest.fixture
def command(tmp_path):
    (tmp_path / "server.py").write_text(SERVER)
    return f"{sys.executable} {tmp_path / 'server.py'} {{model}} {{port}}"


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_server_is_started_asked_and_stopped(tmp_path, command):
    from vlm_sft_rl.teacher import ChatRequest, user_message

    served = ServedModel(command, "the/model", tmp_path / "serve.log", timeout=30, concurrency=2)
    reply = served.client.ask(ChatRequest("a", [user_message("How many?")], n=3))
    assert reply.texts == ["1", "2", "1"]
    text = (tmp_path / "serve.log").read_text()
    assert "serving the/model" in text
    served.stop()
    assert gone(served.process.pid) and gone(int(text.split()[-1]))


def test_a_server_ends_with_a_run_that_is_killed(tmp_path, command):
    log = tmp_path / "serve.log"
    program = (
        "import time\nfrom pathlib import Path\nfrom vlm_sft_rl.self_training.processes import ServedModel\n"
        f"ServedModel({command!r}, 'm', Path({str(log)!r}), timeout=60, concurrency=1)\nprint('up', flush=True)\n"
        "time.sleep(600)"
    )
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "up\n"
    server = int(log.read_text().split()[-1])
    assert not gone(server)
    run.kill()
    run.wait()
    deadline = time.monotonic() + 20
    while not gone(server) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert gone(server)


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("no-such-server {model}", "cannot be started"),
        (
            f"{sys.executable} -c 'print(\"out of memory\"); raise SystemExit(3)'",
            "(?s)ended with status 3.*out of memory",
        ),
        (f"{sys.executable} -c 'import time; time.sleep(60)'", "no answer on port"),
    ],
)
def test_a_server_that_does_not_come_up_is_an_error(tmp_path, command, complaint):
    with pytest.raises(UserError, match=complaint):
        ServedModel(command, "m", tmp_path / "serve.log", timeout=2, concurrency=1)


@pytest.mark.slow
def test_the_loop_samples_from_the_rounds_server(tmp_path, command):
    recipe = loops.write_loop(tmp_path, serve=command, serve_timeout=60.0, max_steps=2)
    summary = self_train(recipe, accelerate_config="cpu")
    assert summary["pools"][0]["samples"] == 24 and summary["pools"][0]["questions_mixed"] == 1.0
    served = [(tmp_path / "run" / f"round-{r}" / "serve.log").read_text() for r in (0, 1)]
    assert all(f"round-{r}/train" in text for r, text in enumerate(served))


@pytest.mark.slow
def test_a_question_that_the_server_refuses_counts_as_unreadable_and_the_loop_goes_on(tmp_path, command):
    recipe = loops.write_loop(tmp_path, variant="zero_shot", serve=command)
    lines = (tmp_path / "test.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    first["question"] += " FORBIDDEN"
    (tmp_path / "test.jsonl").write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    summary = self_train(recipe, accelerate_config="cpu")
    stores = ("direct", "greedy", "samples", "select", "refine")
    assert summary["unanswered"] == {f"round-0/test/{name}": 3 if name == "samples" else 1 for name in stores}
    assert summary["rounds"][0]["unreadable"]["value"] == pytest.approx(1 / len(lines), abs=1e-3)


@pytest.mark.slow
def test_ten_samples_make_the_whole_curve(tmp_path, command):
    """The server answers 1, 2, 1, 2, … and half of the questions have the answer 1: every figure is known."""
    recipe = loops.write_loop(tmp_path, variant="zero_shot", serve=command, test_samples=10)
    (found,) = self_train(recipe, accelerate_config="cpu")["rounds"]
    for system in ("direct", "greedy", "sample", "majority", "self_select", "self_refine"):
        assert found[system]["value"] == 0.5, system
    assert found["pass_at_k"]["value"] == 1.0 and found["out_of_candidates"]["value"] == 0.0
    assert [p["n"] for p in found["scaling"]] == list(range(1, 11))
    # of ten samples five are right: 1 - C(5, n) / C(10, n)
    assert [p["pass"]["value"] for p in found["scaling"]][:3] == [0.5, 0.7778, 0.9167]
    lines = [line.split(",") for line in (tmp_path / "run" / "scaling.csv").read_text().splitlines()[1:]]
    sizes = {}
    for _, n, method, *_ in lines:
        sizes.setdefault(method, []).append(int(n))
    whole = list(range(1, 11))
    assert sizes == {"majority": whole, "pass": whole, "self_select": [2, 3, 4, 5, 6]}
    stores = tmp_path / "run" / "round-0" / "test"
    for n in sizes["self_select"]:
        store = stores / ("select" if n == 3 else f"select-{n}") / "samples.jsonl"
        for line in store.read_text().splitlines():
            prompt = json.loads(line)["prompt"]
            assert f"Try {n}:" in prompt and f"Try {n + 1}:" not in prompt
    report = (tmp_path / "run" / "report.html").read_text()
    assert "More samples, round 0" in report and report.count("<svg") + report.count("<img") >= 1
