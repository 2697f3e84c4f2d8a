"""Client of any endpoint that speaks OpenAI's `/v1/chat/completions` (vLLM, SGLang, `transformers serve`, …).

    client = EndpointClient("http://localhost:8000/v1", "Qwen/Qwen2.5-VL-7B-Instruct", ledger="answers.jsonl")
    for reply in client.complete(ChatRequest(row["id"], [user_message(q, ["a.png"])]) for …):
        print(reply.id, reply.texts, reply.error)
    print(client.usage)

Every answer goes into the ledger under a hash of its request, so that a run that was killed, or is run again,
asks (and pays) only for what is missing. No answer is sampled anew for an equal request: ask for `n` samples
or vary `seed`.
"""

import http.client
import json
import os
import queue
import random
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .chat import ChatRequest, content_key, user_message, wire_messages
from .errors import UserError
from .ledger import Ledger

__all__ = ["ChatRequest", "EndpointClient", "Reply", "Usage", "user_message"]

RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
LONGEST_WAIT = 600.0  # seconds; a server that asks for more is not worth waiting for
FAILURES_AT_START = 3  # so many failures before any answer: the address or the settings are wrong
FAILURES_IN_A_ROW = 32  # so many requests in a row that got no answer at all: the server has gone


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


class Refused(Exception):
    """This request gets no answer, now or later; `answered` tells whether the server said so itself."""

    def __init__(self, message: str, answered: bool = False):
        super().__init__(message)
        self.answered = answered


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
        self.url, self.model = completions_url(base_url), model
        self.concurrency, self.timeout, self.attempts, self.backoff = concurrency, timeout, attempts, backoff
        self.input_price, self.output_price, self.budget = input_price, output_price, budget
        self.key_env = api_key_env or "OPENAI_API_KEY"
        self._key = os.environ.get(self.key_env, "").strip()
        if api_key_env and not self._key:
            raise UserError(f"The environment variable {api_key_env} is not set. Put the API key into it.")
        self.ledger = None if ledger is None else Ledger(ledger)
        self.usage = Usage()
        self.failures: list[tuple[str, str]] = []
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._lock = threading.Lock()
        self._running: dict[str, Future] = {}
        self._not_before = 0.0
        self._in_a_row = 0

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
                        workers.append(threading.Thread(target=self._work, args=(tasks, stop), daemon=True))
                        workers[-1].start()
                if not pending:
                    break
                yield pending.popleft().result()
            if self.failures and not (self.usage.answered or self.usage.cached):
                raise UserError(f"No request was answered. {self.failures[-1][1]}")
        finally:
            stop.set()
            for _ in workers:
                tasks.put(None)

    def _work(self, tasks: queue.SimpleQueue, stop: threading.Event) -> None:
        while (task := tasks.get()) is not None:
            request, future = task
            if stop.is_set():
                return
            try:
                future.set_result(self._reply(request, stop))
            except BaseException as error:  # the caller's thread raises it
                future.set_exception(error)

    def _reply(self, request: ChatRequest, stop: threading.Event) -> Reply:
        messages, digest = wire_messages(request)
        key = content_key(self.model, digest, request)
        with self._lock:
            record = self.ledger.get(key) if self.ledger is not None else None
            if record is not None:
                self.usage.cached += 1
                return _from_record(request.id, record)
            twin = self._running.get(key)
            if twin is None:
                mine = self._running[key] = Future()
        if twin is not None:
            # an equal request is under way: its answer will do for both
            reply = replace(twin.result(), id=request.id, cached=True)
            with self._lock:
                self._count_twin(reply)
            return reply
        try:
            reply = self._pay(request, messages, key, stop)
            mine.set_result(reply)
            return reply
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            with self._lock:
                self._running.pop(key, None)

    def _count_twin(self, reply: Reply) -> None:
        if reply.error is None:
            self.usage.cached += 1
        else:
            self.usage.failed += 1
            self.failures.append((reply.id, reply.error))

    def _pay(self, request: ChatRequest, messages: list[dict], key: str, stop: threading.Event) -> Reply:
        self._check_budget()
        reply = Reply(request.id)
        try:
            # some servers ignore `n`: ask again for what is missing
            while (missing := request.n - len(reply.texts)) > 0:
                self._add(reply, self._send(self._body(request, messages, missing, len(reply.texts)), stop))
        except Refused as error:
            return self._failed(request, error)
        reply.texts, reply.finish_reasons = reply.texts[: request.n], reply.finish_reasons[: request.n]
        if self.ledger is not None:
            record = asdict(reply)
            del record["cached"], record["error"]
            self.ledger.add(key, {"model": self.model, **record})
        with self._lock:
            self.usage.answered += 1
        return reply

    def _failed(self, request: ChatRequest, error: Refused) -> Reply:
        reason = f"request {request.id!r}: {error}"
        with self._lock:
            self.usage.failed += 1
            self.failures.append((request.id, reason))
            self._in_a_row += not error.answered
            first = not (self.usage.answered or self.usage.cached)
            hopeless = (
                first and self.usage.failed >= FAILURES_AT_START
            ) or self._in_a_row >= FAILURES_IN_A_ROW
        if hopeless:
            cure = "is the server up, does the model take images, are the settings right"
            raise UserError(
                f"{self.url}: {self.usage.failed} requests failed, the last: {error}. Check: {cure}?"
            )
        return Reply(request.id, error=reason)

    def _check_budget(self) -> None:
        if self.budget is not None and self.usage.cost >= self.budget:
            kept = "" if self.ledger is None else f" What was answered is kept in {self.ledger.path}."
            raise UserError(
                f"The budget of {self.budget:g} is used up ({self.usage.cost:.4f} spent).{kept} Run again with a larger "
                "budget to go on."
            )

    def _body(self, request: ChatRequest, messages: list[dict], n: int, had: int) -> bytes:
        body = {"model": self.model, "messages": messages, **request.settings(), "n": n}
        if n == 1:
            del body["n"]
        if had and request.seed is not None:
            body["seed"] = request.seed + had
        return json.dumps(body).encode()

    def _add(self, reply: Reply, answer: dict) -> None:
        try:
            choices = answer["choices"]
            texts = [choice["message"].get("content") or "" for choice in choices]
        except (KeyError, TypeError, AttributeError) as error:
            raise Refused(f"the answer has no `choices` with messages: {self._clean(answer):.300}") from error
        if not texts:
            raise Refused("the answer has an empty list of `choices`.")
        reply.texts += texts
        reply.finish_reasons += [str(choice.get("finish_reason") or "") for choice in choices]
        counted = answer.get("usage") or {}
        prompt, completion = counted.get("prompt_tokens") or 0, counted.get("completion_tokens") or 0
        reply.prompt_tokens += prompt
        reply.completion_tokens += completion
        with self._lock:
            self._in_a_row = 0
            self.usage.unmetered += not counted
            self.usage.prompt_tokens += prompt
            self.usage.completion_tokens += completion
            self.usage.cost += (prompt * self.input_price + completion * self.output_price) / 1e6

    def _send(self, body: bytes, stop: threading.Event) -> dict:
        """POST until there is an answer. Raises Refused, or UserError where no request can succeed."""
        problem = ""
        for attempt in range(self.attempts):
            pause = self._not_before - time.monotonic()
            if attempt:
                with self._lock:
                    self.usage.retries += 1
                pause = max(pause, min(60.0, self.backoff * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0))
            if pause > 0 and stop.wait(pause):
                raise Refused("the run was stopped.")
            try:
                return self._post(body)
            except urllib.error.HTTPError as error:
                with error:
                    problem = f"HTTP {error.code} {self._detail(error)}"
                if error.code not in RETRIED:
                    self._give_up(error.code, problem)
                self._hold(error.headers)
            except (OSError, http.client.HTTPException, ValueError) as error:
                problem = f"{type(error).__name__}: {getattr(error, 'reason', None) or error}"
        raise Refused(f"{self.attempts} attempts failed, the last with {self._clean(problem)}")

    def _post(self, body: bytes) -> dict:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, body, headers, method="POST")
        with self._opener.open(request, timeout=self.timeout) as response:
            answer = json.loads(response.read())
        if not isinstance(answer, dict):
            raise ValueError(f"expected a JSON object, found {type(answer).__name__}")
        return answer

    def _give_up(self, code: int, problem: str) -> None:
        if code in (401, 403):
            cure = (
                f"The key in {self.key_env} was not accepted."
                if self._key
                else f"The server wants an API key: put it into the environment variable {self.key_env}."
            )
        elif code == 404:
            cure = f"Check the address, and that the server knows the model {self.model!r}."
        elif 300 <= code < 400:
            cure = "The server redirects, which is not followed: give the final address."
        else:
            raise Refused(f"{self.url} refused it with {problem}", answered=True)
        raise UserError(f"{self.url}: {problem}. {cure}")

    def _hold(self, headers: Any) -> None:
        wait = retry_after(headers)
        if wait is None:
            return
        if wait > LONGEST_WAIT:
            raise Refused(f"the server asks to come back in {wait:.0f} s. Run again then.")
        with self._lock:
            self._not_before = max(self._not_before, time.monotonic() + wait)

    def _detail(self, error: urllib.error.HTTPError) -> str:
        if 300 <= error.code < 400:
            return f"(to {error.headers.get('Location')})"
        try:
            text = error.read(4096).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            return ""
        try:
            found = json.loads(text)
            found = found.get("error", found.get("detail", found.get("message", found)))
            text = found.get("message", found) if isinstance(found, dict) else found
        except (ValueError, AttributeError):
            pass
        return f"({self._clean(text)!s:.400})"

    def _clean(self, value: Any) -> str:
        """The text without the API key, which some servers quote in their errors."""
        return str(value).replace(self._key, "***") if self._key else str(value)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    # a redirect would carry the API key to another host
    def redirect_request(self, *args, **kwargs):
        return None


def completions_url(base_url: str) -> str:
    """The address of `chat/completions` that a base address stands for. Raises UserError where it is none."""
    parts = urlsplit(base_url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{base_url!r} is not an address. Expected one like http://localhost:8000/v1.")
    path = parts.path.rstrip("/") or "/v1"
    if not path.endswith("/chat/completions"):
        path += "/chat/completions"
    return parts._replace(path=path).geturl()


def retry_after(headers: Any, now: Callable[[], float] = time.time) -> float | None:
    """Seconds that a server asks to wait (`Retry-After` in seconds or as a date), or None."""
    value = headers.get("Retry-After") if headers is not None else None
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now())
    except (TypeError, ValueError):
        return None


def _from_record(identity: str, record: dict) -> Reply:
    kept = {name: record[name] for name in ("texts", "finish_reasons", "prompt_tokens", "completion_tokens")}
    return Reply(identity, **kept, cached=True)
