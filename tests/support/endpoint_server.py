"""A real HTTP server on this machine that speaks `/v1/chat/completions`; a Python function answers."""

import json
import random
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from vlm_sft_rl.teacher import ChatRequest, user_message

Answer = Callable[[dict], str | list[str] | dict | bytes | Callable[[BaseHTTPRequestHandler], None]]


class EndpointServer:
    """Serve until the `with` block ends.

    Args:
        answer: body of a request -> text, list of texts, a whole answer object, bytes in its place, or a function that
            writes the answer to the handler itself.
        refuses: fields of a request -> status that it gets with them.
        fail_rate: share of requests, drawn under `seed`, that get a failure in turn: 500, 503, a dropped
            connection, half an answer.
        limit_first: so many requests get 429 with `Retry-After: retry_after`.
        hang_first: so many requests are never answered (until the server closes).
        status: answer everything with this status and `detail`.
        key: API key that is asked for.
        with_n: False ignores `n`, as some servers do.
        delay: seconds before each answer.

    Attributes:
        url: base address, with `/v1`.
        bodies: bodies of all requests that were answered with 200, in order.
        calls: number of requests, failures included.
        most_at_once: the most requests that were in work together.
    """

    def __init__(
        self,
        answer: Answer,
        *,
        fail_rate: float = 0.0,
        limit_first: int = 0,
        retry_after: str | None = "0.3",
        hang_first: int = 0,
        status: int = 200,
        detail: str = "no",
        key: str | None = None,
        with_n: bool = True,
        delay: float = 0.0,
        seed: int = 0,
        refuses: dict[str, int] | None = None,
        host: str = "127.0.0.1",
    ):
        self.refuses, self.host = refuses or {}, host
        self.answer, self.fail_rate, self.limit_first, self.retry_after = (
            answer,
            fail_rate,
            limit_first,
            retry_after,
        )
        self.hang_first, self.status, self.detail, self.key = hang_first, status, detail, key
        self.with_n, self.delay = with_n, delay
        self.bodies: list[dict] = []
        self.calls = self.now = self.most_at_once = self.failures = 0
        self.times: list[float] = []
        self._rng, self._lock, self._closing = random.Random(seed), threading.Lock(), threading.Event()

    def __enter__(self) -> "EndpointServer":
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                server._handle(self)

            def log_message(self, *args):
                pass

        class Http(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
            daemon_threads = True

            def handle_error(self, *args):
                pass  # a client that went away

        self._http = Http((self.host, 0), Handler)
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        name = f"[{self.host}]" if ":" in self.host else self.host
        self.url = f"http://{name}:{self._http.server_port}/v1"
        return self

    def __exit__(self, *exception) -> None:
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            self.calls += 1
            self.times.append(time.monotonic())
            number = self.calls
            self.now += 1
            self.most_at_once = max(self.most_at_once, self.now)
            failing = self._rng.random() < self.fail_rate
            self.failures += failing
            kind = self.failures % 4
        if self.delay:
            time.sleep(self.delay)
        with self._lock:  # before the answer: whoever has it may ask again at once
            self.now -= 1
        self._respond(handler, body, number, kind if failing else None)

    def _respond(self, handler, body: dict, number: int, failure: int | None) -> None:
        if handler.path != "/v1/chat/completions":
            return _send(handler, 404, {"error": {"message": "no such path"}})
        if self.key and handler.headers.get("Authorization") != f"Bearer {self.key}":
            return _send(
                handler, 401, {"error": {"message": f"bad key {handler.headers.get('Authorization')}"}}
            )
        if self.status != 200:
            headers = {"Location": "http://127.0.0.1:9/"} if 300 <= self.status < 400 else {}
            return _send(handler, self.status, {"error": {"message": self.detail}}, **headers)
        if number <= self.hang_first:
            self._closing.wait()
            return None
        if number <= self.limit_first:
            headers = {} if self.retry_after is None else {"Retry-After": self.retry_after}
            return _send(handler, 429, {"error": {"message": "slow down"}}, **headers)
        if failure in (0, 1):
            return _send(handler, (500, 503)[failure], {"error": {"message": "passing trouble"}})
        if failure == 2:
            handler.close_connection = True
            handler.connection.close()
            return None
        if refused := [name for name in self.refuses if name in body]:
            return _send(handler, self.refuses[refused[0]], {"detail": f"no {refused[0]} here"})
        answer = self.answer(body)
        if callable(answer):
            return answer(handler)
        if isinstance(answer, bytes):
            return _send(handler, 200, answer)
        if not isinstance(answer, dict):
            answer = self._completion(body, [answer] if isinstance(answer, str) else answer)
        if failure is None:
            with self._lock:
                self.bodies.append(body)
        _send(handler, 200, answer, cut=failure == 3)

    def _completion(self, body: dict, texts: list[str]) -> dict:
        wanted = body.get("n", 1) if self.with_n else 1
        texts = (texts * wanted)[:wanted]
        choices = [
            {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            for i, text in enumerate(texts)
        ]
        counted = {"prompt_tokens": 100, "completion_tokens": sum(len(t.split()) for t in texts)}
        return {"object": "chat.completion", "model": body["model"], "choices": choices, "usage": counted}


def _send(handler, status: int, value: dict | bytes, cut: bool = False, **headers) -> None:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    handler.send_response(status)
    for name, text in {"Content-Type": "application/json", "Content-Length": str(len(data))}.items():
        handler.send_header(name, text)
    for name, text in headers.items():
        handler.send_header(name.replace("_", "-"), text)
    handler.end_headers()
    handler.wfile.write(data[: len(data) // 2] if cut else data)
    if cut:
        handler.close_connection = True


def requests(count: int, **settings) -> list[ChatRequest]:
    return [ChatRequest(f"r{i}", [user_message(f"number {i}")], **settings) for i in range(count)]
