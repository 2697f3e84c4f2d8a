"""Asking a model behind any endpoint that speaks OpenAI's `/v1/chat/completions` (vLLM, SGLang, `transformers serve`, …).

    client = EndpointClient("http://localhost:8000/v1", "Qwen/Qwen2.5-VL-7B-Instruct", ledger="answers.jsonl")
    for reply in client.complete(ChatRequest(row["id"], [user_message(q, ["a.png"])]) for …):
        print(reply.id, reply.texts, reply.error)
    print(client.usage)

Every answer goes into the ledger under a hash of its request, so that a run that was killed, or is run again,
asks (and pays) only for what is missing. No answer is sampled anew for an equal request: ask for `n` samples
or vary `seed`.
"""

import base64
import fcntl
import hashlib
import http.client
import io
import json
import os
import queue
import random
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import ExifTags

from .data.images import locate, open_image, open_picture
from .errors import UserError
from .io import append_jsonl

MIME = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
LONGEST_BACKOFF = 60.0  # seconds
LONGEST_WAIT = 600.0  # seconds; a server that asks for more is not worth waiting for
FAILURES_AT_START = 3  # so many failures before any answer: the address or the settings are wrong
FAILURES_IN_A_ROW = 32  # so many requests in a row that got no answer at all: the server has gone


# --- Requests ---


@dataclass(frozen=True)
class ChatRequest:
    """One request of a chat model.

    Args:
        id: the caller's name for it; not part of what is sent.
        messages: `{"role", "content"}`; content is text, or a list of `{"type": "text", "text"}` and
            `{"type": "image", "image": path, PIL image or datasets.Image value}`.
        max_tokens: None leaves the limit to the server.
        n: answers wanted.
        stop: strings that end an answer.
        extra: further fields of the body, such as vLLM's `top_k` or `guided_json`.
        image_root: folder that image paths are relative to and must not leave.
    """

    id: str
    messages: Sequence[dict]
    max_tokens: int | None = 512
    temperature: float = 0.0
    top_p: float | None = None
    n: int = 1
    stop: Sequence[str] = ()
    seed: int | None = None
    extra: dict = field(default_factory=dict)
    image_root: str | Path | None = None

    def settings(self) -> dict:
        """The sampling fields of the request's body."""
        names = ("max_tokens", "temperature", "top_p", "n", "seed")
        fields = {name: getattr(self, name) for name in names}
        fields |= {"stop": list(self.stop) or None, **self.extra}
        return {name: value for name, value in fields.items() if value is not None}


def user_message(text: str, images: Sequence[Any] = ()) -> dict:
    """A user's message: the images, then the text."""
    if not images:
        return {"role": "user", "content": text}
    parts: list[dict] = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def wire_messages(request: ChatRequest) -> tuple[list[dict], list[dict]]:
    """The messages as they are sent (images as data URLs), and the same with each image's hash in its place.

    Raises:
        RowError: an image is missing, damaged or outside of `image_root`.
    """
    sent, hashed = [], []
    for message in request.messages:
        role, content = message["role"], message["content"]
        parts = digests = content
        if not isinstance(content, str):
            parts, digests = [], []
            for part in content:
                if part["type"] == "image":
                    mime, data, digest = encode_image(part["image"], request.image_root)
                    url = f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"
                    parts.append({"type": "image_url", "image_url": {"url": url}})
                    digests.append({"image": digest})
                else:
                    parts.append({"type": "text", "text": part["text"]})
                    digests.append(parts[-1])
        sent.append({"role": role, "content": parts})
        hashed.append({"role": role, "content": digests})
    return sent, hashed


def encode_image(item: Any, image_root: str | Path | None = None) -> tuple[str, bytes, str]:
    """An image as `(mime type, bytes, SHA-256 of its content)`.

    A JPEG, PNG or WebP file that is upright is sent as it is; everything else as PNG, upright and RGB. Raises
    RowError as `open_image` does.
    """
    if isinstance(item, dict) and item.get("bytes") is None:
        item = item.get("path")
    image = open_image(item, image_root)  # refuses what is damaged before anybody pays for it
    data = None
    if isinstance(item, str | Path):
        data = locate(item, image_root).read_bytes()
    elif isinstance(item, dict):
        data = item["bytes"]
    if data is not None:
        with open_picture(io.BytesIO(data)) as original:
            mime = MIME.get(original.format)
            upright = original.getexif().get(ExifTags.Base.Orientation, 1) == 1
        if mime and upright:
            return mime, data, hashlib.sha256(data).hexdigest()
    # the pixels and not the encoded bytes are hashed: encoders change from version to version
    digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return "image/png", stream.getvalue(), digest


# --- Answers ---


@dataclass
class Reply:
    """Answers to one request: `n` texts, or none and the reason in `error`."""

    id: str
    texts: list[str] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: bool = False
    error: str | None = None


@dataclass
class Usage:
    """What a run asked for. Tokens and `cost` are of this run alone; `unmetered` answers came without a count."""

    answered: int = 0
    cached: int = 0
    failed: int = 0
    retries: int = 0
    unmetered: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    def to_json(self) -> dict:
        return asdict(self)


class Ledger:
    """A JSONL file of answers by the hash of their request: safe between threads, used by one process at a time.

    Only keys and offsets stand in memory; an answer is read back from the file when it is asked for.

    Args:
        path: the file; it and its folder are made when missing. A last line that a killed process left
            unfinished is cut off.

    Raises:
        UserError: another process uses the ledger, a line in it is damaged, or it cannot be written to.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock = threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = open(self.path, "a+b")  # noqa: SIM115 - kept, with its lock, until close()
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be opened for writing ({error.strerror}). Choose another ledger file."
            ) from error
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._handle.close()
            raise UserError(
                f"{self.path}: another process is using this ledger. Wait for it, or give this run a ledger of its own."
            ) from error
        self._offsets: dict[str, int] = {}
        offset = 0
        self._handle.seek(0)
        for number, line in enumerate(self._handle, 1):
            if not line.endswith(b"\n"):
                # a process killed while it appended: the answer is lost, the lines before it are not
                os.truncate(self.path, offset)
                break
            if line.strip():
                try:
                    self._offsets[json.loads(line)["key"]] = offset
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(
                        f"{self.path}, line {number}: not a record of a ledger. Remove the line; its answer will be "
                        "asked for again."
                    ) from error
            offset += len(line)

    def get(self, key: str) -> dict | None:
        """The record stored under `key`, or None."""
        with self._lock:
            if key not in self._offsets:
                return None
            self._handle.seek(self._offsets[key])
            return json.loads(self._handle.readline())

    def add(self, key: str, record: dict) -> None:
        """Store a record; it is on the disk when this returns."""
        with self._lock:
            offset = self.path.stat().st_size
            append_jsonl(self.path, [{"key": key, **record}])
            self._offsets[key] = offset

    def close(self) -> None:
        self._handle.close()


# --- The client ---


class _Refused(Exception):
    """This request gets no answer, now or later; `answered` tells whether the server said so itself."""

    def __init__(self, message: str, answered: bool = False):
        super().__init__(message)
        self.answered = answered


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    # a redirect would carry the API key to another host
    def redirect_request(self, *args, **kwargs):
        return None


class EndpointClient:
    """Sends chat requests, several at a time, again when they fail for a passing reason, never twice when answered.

    Args:
        base_url: "http://host:8000", "https://host/v1" or the full address of `chat/completions`.
        model: the name that the server knows the model by.
        ledger: JSONL file of answers; None keeps them nowhere.
        api_key_env: environment variable with the API key. None: OPENAI_API_KEY if it is set, else no key. The
            key is sent to `base_url` alone and never written or shown.
        concurrency: requests in flight.
        timeout: seconds without a byte from the server after which a request counts as dropped.
        attempts: tries for each request, the first included.
        backoff: seconds before the second try; doubled each time, with jitter, up to a minute. A `Retry-After`
            of the server is kept to, by all requests.
        input_price, output_price: per million tokens, in any currency; only for the count of `usage.cost`.
        budget: stop when `usage.cost` reaches it (requests in flight are still paid).

    Attributes:
        usage: what was asked for so far.
        failures: id of and reason for each request that got no answer.

    Raises:
        UserError: an address that is none, a named variable that is not set, a ledger in use.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        ledger: str | Path | None = None,
        api_key_env: str | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        attempts: int = 6,
        backoff: float = 1.0,
        input_price: float = 0.0,
        output_price: float = 0.0,
        budget: float | None = None,
    ):
        if concurrency < 1 or attempts < 1 or timeout <= 0 or backoff < 0:
            raise UserError("concurrency and attempts must be at least 1, timeout and backoff positive.")
        self.url, self.model, self.concurrency = completions_url(base_url), model, concurrency
        self.timeout, self.attempts, self.backoff = timeout, attempts, backoff
        self.input_price, self.output_price, self.budget = input_price, output_price, budget
        self._key_env = api_key_env or "OPENAI_API_KEY"
        self._key = os.environ.get(self._key_env, "").strip()
        if api_key_env and not self._key:
            raise UserError(f"The environment variable {api_key_env} is not set. Put the API key into it.")
        self._opener = urllib.request.build_opener(_NoRedirect)
        self.ledger = None if ledger is None else Ledger(ledger)
        self.usage = Usage()
        self.failures: list[tuple[str, str]] = []
        self._lock = threading.Lock()  # of everything below, and of the counts
        self._running: dict[str, Future] = {}
        self._dropped_in_a_row = 0
        self._not_before = 0.0  # what `Retry-After` says, for all threads

    def __enter__(self) -> "EndpointClient":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the ledger."""
        if self.ledger is not None:
            self.ledger.close()

    def ask(self, request: ChatRequest) -> Reply:
        """One request. Raises UserError as `complete` does."""
        return next(self.complete([request]))

    def complete(self, requests: Iterable[ChatRequest]) -> Iterator[Reply]:
        """Yield a reply for each request, in their order; `requests` may be endless, it is read as needed.

        A request that fails for good gives a reply with `error` and an entry in `failures`; the run goes on.

        Raises:
            UserError: no use in going on: key refused (401, 403), no such address or model (404), a redirect,
                every request refused (400), no server there or gone, or the budget is used up.
            RowError: an image of a request cannot be opened.
        """
        stop = threading.Event()
        tasks: queue.SimpleQueue = queue.SimpleQueue()
        workers: list[threading.Thread] = []
        errors: list[BaseException] = []
        pending: deque[Future] = deque()
        source = iter(requests)
        try:
            while True:
                while len(pending) < 4 * self.concurrency:
                    request = next(source, None)
                    if request is None:
                        break
                    pending.append(Future())
                    tasks.put((request, pending[-1]))
                    if len(workers) < self.concurrency:
                        # daemons: an interrupted program must not wait for answers that nobody will read
                        worker = threading.Thread(target=self._work, args=(tasks, stop, errors), daemon=True)
                        workers.append(worker)
                        worker.start()
                if not pending:
                    break
                yield pending.popleft().result()
            if self.failures and not (self.usage.answered or self.usage.cached):
                raise UserError(f"No request was answered. {self.failures[-1][1]}")
        finally:
            stop.set()
            for _ in workers:
                tasks.put(None)

    def _work(self, tasks: queue.SimpleQueue, stop: threading.Event, errors: list[BaseException]) -> None:
        while (task := tasks.get()) is not None and not stop.is_set():
            request, future = task
            try:
                if errors:
                    raise errors[0]  # an error ends the run: nothing more is sent
                future.set_result(self._reply(request, stop))
            except BaseException as error:  # the caller's thread raises it
                errors.append(error)
                future.set_exception(error)

    def _reply(self, request: ChatRequest, stop: threading.Event) -> Reply:
        """From the ledger, from an equal request that is under way, or from the server."""
        messages, digests = wire_messages(request)
        # all that decides an answer: model, messages, images, sampling settings
        identity = {"model": self.model, "messages": digests, **request.settings()}
        text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        key = hashlib.sha256(text.encode()).hexdigest()
        with self._lock:
            record = self.ledger.get(key) if self.ledger is not None else None
            if record is not None:
                self.usage.cached += 1
                names = ("texts", "finish_reasons", "prompt_tokens", "completion_tokens")
                return Reply(request.id, **{name: record[name] for name in names}, cached=True)
            twin = self._running.get(key)
            if twin is None:
                mine = self._running[key] = Future()
        if twin is not None:
            reply = replace(twin.result(), id=request.id, cached=True)
            with self._lock:
                if reply.error is None:
                    self.usage.cached += 1
                else:
                    self.usage.failed += 1
                    self.failures.append((reply.id, reply.error))
            return reply
        try:
            reply = self._pay(request, messages, stop)
            if self.ledger is not None and reply.error is None:
                paid = {
                    name: value for name, value in asdict(reply).items() if name not in ("cached", "error")
                }
                self.ledger.add(key, {"model": self.model, **paid})
            mine.set_result(reply)
            return reply
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            with self._lock:
                self._running.pop(key, None)

    def _pay(self, request: ChatRequest, messages: list[dict], stop: threading.Event) -> Reply:
        if self.budget is not None and self.usage.cost >= self.budget:
            kept = "" if self.ledger is None else f" What was answered is kept in {self.ledger.path}."
            raise UserError(
                f"The budget of {self.budget:g} is used up ({self.usage.cost:.4f} spent).{kept} Run again with a larger "
                "budget to go on."
            )
        reply = Reply(request.id)
        try:
            # some servers ignore `n`: ask again for what is missing
            while (missing := request.n - len(reply.texts)) > 0:
                body = {"model": self.model, "messages": messages, **request.settings(), "n": missing}
                if missing == 1:
                    del body["n"]
                if reply.texts and request.seed is not None:
                    body["seed"] = request.seed + len(reply.texts)
                self._add(reply, self._send(json.dumps(body).encode(), stop))
        except _Refused as error:
            return self._failed(request, error)
        reply.texts, reply.finish_reasons = reply.texts[: request.n], reply.finish_reasons[: request.n]
        with self._lock:
            self.usage.answered += 1
        return reply

    def _add(self, reply: Reply, answer: dict) -> None:
        try:
            choices = answer["choices"]
            texts = [choice["message"].get("content") or "" for choice in choices]
        except (KeyError, TypeError, AttributeError) as error:
            raise _Refused(
                f"the answer has no `choices` with messages: {self._without_key(answer):.300}"
            ) from error
        if not texts:
            raise _Refused("the answer has an empty list of `choices`.")
        reply.texts += texts
        reply.finish_reasons += [str(choice.get("finish_reason") or "") for choice in choices]
        counts = answer.get("usage") or {}
        prompt, completion = counts.get("prompt_tokens") or 0, counts.get("completion_tokens") or 0
        reply.prompt_tokens += prompt
        reply.completion_tokens += completion
        with self._lock:
            self._dropped_in_a_row = 0
            self.usage.unmetered += not counts
            self.usage.prompt_tokens += prompt
            self.usage.completion_tokens += completion
            self.usage.cost += (prompt * self.input_price + completion * self.output_price) / 1e6

    def _failed(self, request: ChatRequest, error: _Refused) -> Reply:
        reason = f"request {request.id!r}: {error}"
        with self._lock:
            self.usage.failed += 1
            self.failures.append((request.id, reason))
            self._dropped_in_a_row += not error.answered
            at_start = not (self.usage.answered or self.usage.cached)
            hopeless = at_start and self.usage.failed >= FAILURES_AT_START
        if hopeless or self._dropped_in_a_row >= FAILURES_IN_A_ROW:
            cure = "is the server up, does the model take images, are the settings right"
            raise UserError(
                f"{self.url}: {self.usage.failed} requests failed, the last: {error}. Check: {cure}?"
            )
        return Reply(request.id, error=reason)

    def _send(self, body: bytes, stop: threading.Event) -> dict:
        """POST until there is an answer. Raises _Refused, or UserError where no request can succeed."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        problem = ""
        for attempt in range(self.attempts):
            pause = self._not_before - time.monotonic()
            if attempt:
                with self._lock:
                    self.usage.retries += 1
                backoff = min(LONGEST_BACKOFF, self.backoff * 2 ** (attempt - 1))
                pause = max(pause, backoff * random.uniform(0.5, 1.0))
            if pause > 0 and stop.wait(pause):
                raise _Refused("the run was stopped.")
            request = urllib.request.Request(self.url, body, headers, method="POST")
            try:
                with self._opener.open(request, timeout=self.timeout) as response:
                    answer = json.loads(response.read())
                if isinstance(answer, dict):
                    return answer
                problem = f"ValueError: expected a JSON object, found {type(answer).__name__}"
            except urllib.error.HTTPError as error:
                with error:
                    problem = f"HTTP {error.code} {self._detail(error)}"
                if error.code not in RETRIED:
                    raise self._final(error.code, problem) from error
                wait = retry_after(error.headers) or 0.0
                if wait > LONGEST_WAIT:
                    raise _Refused(
                        f"the server asks to come back in {wait:.0f} s. Run again then."
                    ) from error
                with self._lock:
                    self._not_before = max(self._not_before, time.monotonic() + wait)
            except (OSError, http.client.HTTPException, ValueError) as error:
                problem = f"{type(error).__name__}: {getattr(error, 'reason', None) or error}"
        raise _Refused(f"{self.attempts} attempts failed, the last with {self._without_key(problem)}")

    def _final(self, code: int, problem: str) -> Exception:
        """The error of an answer that will not change: of this request alone, or of every request."""
        if code in (401, 403) and self._key:
            cure = f"The key in {self._key_env} was not accepted."
        elif code in (401, 403):
            cure = f"The server wants an API key: put it into the environment variable {self._key_env}."
        elif code == 404:
            cure = f"Check the address, and that the server knows the model {self.model!r}."
        elif 300 <= code < 400:
            cure = "The server redirects, which is not followed: give the final address."
        else:
            return _Refused(f"{self.url} refused it with {problem}", answered=True)
        return UserError(f"{self.url}: {problem}. {cure}")

    def _detail(self, error: urllib.error.HTTPError) -> str:
        if 300 <= error.code < 400:
            return f"(to {error.headers.get('Location')})"
        try:
            text = error.read(4096).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            return ""
        try:
            value = json.loads(text)
            value = value.get("error", value.get("detail", value.get("message", value)))
            text = value.get("message", value) if isinstance(value, dict) else value
        except (ValueError, AttributeError):
            pass  # not JSON, or not an object: shown as it is
        return f"({self._without_key(text):.400})"

    def _without_key(self, value: Any) -> str:
        # some servers quote the key in their errors
        return str(value).replace(self._key, "***") if self._key else str(value)


def completions_url(base_url: str) -> str:
    """The address of `chat/completions` that a base address stands for. Raises UserError where it is none."""
    parts = urlsplit(base_url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{base_url!r} is not an address. Expected one like http://localhost:8000/v1.")
    path = parts.path.rstrip("/") or "/v1"
    if not path.endswith("/chat/completions"):
        path += "/chat/completions"
    return parts._replace(path=path).geturl()


def retry_after(headers: Mapping[str, str], now: Callable[[], float] = time.time) -> float | None:
    """Seconds that a server asks to wait (`Retry-After` in seconds or as a date), or None."""
    value = headers.get("Retry-After")
    try:
        return max(0.0, float(value))
    except (TypeError, ValueError):
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now())
    except (TypeError, ValueError):
        return None
