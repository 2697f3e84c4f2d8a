"""The HTTP side of the server: routes, limits, streams. Requests are read by `protocol`, decoded by `batch`."""

import asyncio
import json
import logging
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from importlib import resources
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from ..decoding.answers import Answer
from ..decoding.config import engine_version
from ..decoding.machines import Machine
from ..errors import NotFinite, UserError, first_line
from .batch import Busy, Closed, ContinuousBatch, Ticket
from .config import ServeConfig
from .protocol import ChatBody, Limits, Reply, RequestError, read_body

FETCH_SECONDS = 10.0
GONE_SECONDS = 0.2  # how often a client is looked for while its answer is decoded
HALF = "\ufffd"  # what half of a character is decoded to
logger = logging.getLogger(__name__)


class Metrics:
    """What `/metrics` shows."""

    def __init__(self, batch: ContinuousBatch):
        self.registry = CollectorRegistry()
        prefix = "vlm_sft_rl_"
        self.requests = Counter(prefix + "requests", "Requests by status", ["status"], registry=self.registry)
        self.seconds = Histogram(
            prefix + "request_seconds", "From a request to the end of its answer", registry=self.registry
        )
        self.kept = Counter(prefix + "tokens_kept", "Tokens of answers", registry=self.registry)
        self.forwarded = Counter(
            prefix + "tokens_forwarded", "Tokens read by the language model", registry=self.registry
        )
        self.rejections = Counter(prefix + "rejections", "Phrases taken back", registry=self.registry)
        self.unverified = Counter(
            prefix + "answers_not_verified",
            "Answers in which a phrase stayed doubtful",
            registry=self.registry,
        )
        for name, help, place in (("rows", "Answers being decoded", 0), ("waiting", "Requests that wait", 1)):
            gauge = Gauge(prefix + name, help, registry=self.registry)
            gauge.set_function(lambda place=place: batch.counts()[place])

    def count(self, answers: list[Answer]) -> None:
        for answer in answers:
            self.kept.inc(answer.counts.tokens_kept)
            self.forwarded.inc(answer.counts.tokens_forwarded)
            self.rejections.inc(sum(event["kind"] == "reject" for event in answer.trace))
            self.unverified.inc(answer.threshold is not None and not answer.ok)


def create_app(
    batch: ContinuousBatch,
    folder: Path,
    default: str,
    config: ServeConfig,
    *,
    name: str,
    key: str | None = None,
) -> FastAPI:
    """The server's application.

    Args:
        folder: the checkpoint; default: the decoder of requests that name none.
        name: what clients call the model; key: what they must send.
    """
    app = FastAPI(title="vlm_sft_rl", docs_url=None, redoc_url=None, openapi_url=None)
    metrics, limits = Metrics(batch), Limits(config.new_tokens, config.pixels)
    most_bytes = int(config.megabytes * 1e6)
    if config.image_urls:
        limits = Limits(config.new_tokens, config.pixels, lambda url: fetch_picture(url, most_bytes))
    started, engine = int(time.time()), engine_version(config.engine)

    @app.exception_handler(RequestError)
    async def refuse(request: Request, error: RequestError) -> JSONResponse:
        metrics.requests.labels(error.status).inc()
        headers = {"Retry-After": "1"} if error.status in (429, 503) else None
        return JSONResponse(error.to_json(), error.status, headers)

    @app.exception_handler(404)
    async def unknown(request: Request, error: Exception) -> JSONResponse:
        message = f"There is no {request.url.path} here, but /v1/chat/completions, /v1/models, /health and /metrics."
        return JSONResponse(RequestError(message, status=404).to_json(), 404)

    def admit(request: Request) -> None:
        scheme, _, sent = request.headers.get("authorization", "").partition(" ")
        if key is not None and not (
            scheme.lower() == "bearer" and secrets.compare_digest(sent.encode(), key.encode())
        ):
            raise RequestError("The key is missing or wrong: send `Authorization: Bearer KEY`.", None, 401)

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/health")
    async def health() -> JSONResponse:
        rows, waiting = batch.counts()
        status, code = ("ok", 200) if batch.alive else ("ended", 503)
        return JSONResponse({"status": status, "rows": rows, "waiting": waiting}, code)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models(request: Request) -> dict:
        admit(request)
        model = {"id": name, "object": "model", "created": started, "owned_by": "vlm_sft_rl"}
        model |= {"decoder": default, "engine": engine}
        return {"object": "list", "data": [model]}

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        admit(request)
        begun = time.monotonic()
        data = await read_limited(request, most_bytes)
        body = await run_in_threadpool(read_body, data, folder, default, limits)
        if body.model != name:
            raise RequestError(f"There is no model {body.model!r} here; this is {name!r}.", "model", 404)
        reply, stream = Reply(name, body.trace), Stream(batch, body)
        try:
            prompt = await run_in_threadpool(batch.encode, body.messages, body.images)
            stream.submit(prompt)
        except UserError as error:
            raise RequestError(str(error), "messages") from None
        except Busy:
            raise RequestError(f"{config.waiting} requests wait already. Try again.", None, 429) from None
        except Closed as error:
            raise RequestError(str(error), None, 503) from None

        def done(answers: list[Answer]) -> None:
            metrics.count(answers)
            metrics.seconds.observe(time.monotonic() - begun)
            metrics.requests.labels(200).inc()

        if body.stream:
            return StreamingResponse(stream.events(reply, done), media_type="text/event-stream")
        answers = await stream.wait(request)
        done(answers)
        return JSONResponse(reply.whole(answers, stream.reasons()))

    return app


async def read_limited(request: Request, most_bytes: int) -> bytes:
    """The body of a request. Raises RequestError: it is longer than `most_bytes`."""
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > most_bytes:
            raise RequestError(f"The body is larger than {most_bytes / 1e6:g} MB.", None, 413)
        chunks.append(chunk)
    return b"".join(chunks)


def fetch_picture(url: str, most_bytes: int) -> bytes:
    """Fetch a picture. Raises RequestError: another scheme, no answer in time, or too large."""
    if not url.startswith(("http://", "https://")):
        raise RequestError("A picture's address must begin with https://, http:// or data:.", "messages")
    try:
        with urllib.request.urlopen(url, timeout=FETCH_SECONDS) as response:
            data = response.read(most_bytes + 1)
    except (OSError, ValueError) as error:
        raise RequestError(f"The picture cannot be fetched ({first_line(error)}).", "messages") from None
    if len(data) > most_bytes:
        raise RequestError(f"The picture is larger than {most_bytes / 1e6:g} MB.", "messages", 413)
    return data


class Stream:
    """A request between the batch's thread and the event loop."""

    def __init__(self, batch: ContinuousBatch, body: ChatBody):
        self.batch, self.body = batch, body
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue = asyncio.Queue()
        self.ticket: Ticket | None = None
        self._sent = [""] * body.n
        self._shown = [0] * body.n

    def submit(self, prompt) -> None:
        body = self.body
        listener = self._listen if body.stream else None
        self.ticket = self.batch.submit(prompt, body.config, n=body.n, stop=body.stop, listener=listener)
        self.ticket.answers.add_done_callback(lambda future: self._put(("done", 0, None)))

    def _put(self, item: tuple) -> None:
        try:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)
        except RuntimeError:  # the loop was closed: nobody listens any more
            logger.debug("An event came behind the end of the server")

    def _listen(self, number: int, machine: Machine) -> None:
        """In the batch's thread: what is new, as text and as events."""
        trace, shown = machine.trace, self._shown[number]
        self._shown[number] = len(trace)
        if self.body.trace and len(trace) > shown:
            self._put(("trace", number, trace[shown:]))
        text = committed_text(machine)
        if text.startswith(self._sent[number]) and len(text) > len(self._sent[number]):
            self._put(("text", number, text[len(self._sent[number]) :]))
            self._sent[number] = text

    def reasons(self) -> list[str]:
        """Why each answer ended, in OpenAI's words."""
        machines = [job.machine for job in self.ticket.jobs]
        return ["length" if len(m.ids) >= m.config.max_new_tokens else "stop" for m in machines]

    async def wait(self, request: Request) -> list[Answer]:
        """The answers. Raises RequestError: the engine refuses the request, decoding failed, or the client has gone."""
        answers = self.ticket.answers
        try:
            while not answers.done():
                try:
                    await asyncio.wait_for(self.queue.get(), GONE_SECONDS)
                except TimeoutError:
                    if await request.is_disconnected():
                        raise RequestError("The client has gone.", None, 499) from None
            return self._answers()
        finally:
            if not answers.done():
                self.batch.cancel(self.ticket)

    def _answers(self) -> list[Answer]:
        error = self.ticket.answers.exception()
        if isinstance(error, UserError) and not isinstance(error, NotFinite):
            raise RequestError(str(error), "messages")
        if error is not None:
            raise RequestError(f"Decoding failed: {first_line(error)}", None, 500)
        return self.ticket.answers.result()

    async def events(self, reply: Reply, done: Callable[[list[Answer]], None]) -> AsyncIterator[str]:
        """The reply as server-sent events: only text that no rewind takes back; with `trace` the doubts, too."""
        try:
            for number in range(self.body.n):
                yield _event(reply.piece(number, {"role": "assistant", "content": ""}))
            while True:
                kind, number, value = await self.queue.get()
                if kind == "done":
                    break
                if kind == "text":
                    yield _event(reply.piece(number, {"content": value}))
                else:
                    yield _event({"index": number, "events": value}, "trace")
            try:
                answers = self._answers()
            except RequestError as error:
                yield _event(error.to_json())
                return
            done(answers)
            for number, (answer, reason) in enumerate(zip(answers, self.reasons(), strict=True)):
                if rest := answer.text[len(self._sent[number]) :]:
                    yield _event(reply.piece(number, {"content": rest}))
                yield _event(reply.last_piece(number, answer, reason))
            if self.body.include_usage:
                yield _event(reply.usage_piece(answers))
            yield "data: [DONE]\n\n"
        finally:
            if not self.ticket.answers.done():
                self.batch.cancel(self.ticket)


def committed_text(machine: Machine) -> str:
    """The text of an answer as far as it will stay, without what the next token may still join or pull nearer."""
    text = machine.grammar.plain(machine.ids[: machine.committed])
    while text and (text[-1] == HALF or not text[-1].isalnum()):
        text = text[:-1]
    return text


def _event(value: dict, kind: str | None = None) -> str:
    head = f"event: {kind}\n" if kind else ""
    return f"{head}data: {json.dumps(value, ensure_ascii=False)}\n\n"
