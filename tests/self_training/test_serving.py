import os
import sys

import loops
import pytest

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.self_train import self_train
from vlm_sft_rl.self_training.serving import ServedModel

SERVER = """
import json, sys
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
        self.send({"model": body["model"], "choices": choices})
    def log_message(self, *args):
        pass

print("serving", sys.argv[1], flush=True)
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
    from vlm_sft_rl.endpoint.chat import ChatRequest, user_message

    served = ServedModel(command, "the/model", tmp_path / "serve.log", timeout=30, concurrency=2)
    reply = served.client.ask(ChatRequest("a", [user_message("How many?")], n=3))
    assert reply.texts == ["1", "2", "1"]
    served.stop()
    assert gone(served.process.pid)
    assert "serving the/model" in (tmp_path / "serve.log").read_text()


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
