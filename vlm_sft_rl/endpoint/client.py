"""Client of any endpoint that speaks OpenAI's `/v1/chat/completions` (vLLM, SGLang, `transformers serve`, …).

    client = EndpointClient("http://localhost:8000/v1", "Qwen/Qwen2.5-VL-7B-Instruct", ledger="answers.jsonl")
    for reply in client.complete(ChatRequest(row["id"], [user_message(q, ["a.png"])]) for …):
        print(reply.id, reply.texts, reply.error)
    print(client.usage)

Every answer goes into the ledger under a hash of its request, so that a run that was killed, or is run again,
asks (and pays) only for what is missing. No answer is sampled anew for an equal request: ask for `n` samples
or vary `seed`.
"""

import json
import os
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ..errors import UserError
from .chat import ChatRequest, content_key, wire_messages
from .ledger import Ledger
from .transport import Refused, Transport, completions_url

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
        self.concurrency = concurrency
        self.input_price, self.output_price, self.budget = input_price, output_price, budget
        if api_key_env and not os.environ.get(api_key_env, "").strip():
            raise UserError(f"The environment variable {api_key_env} is not set. Put the API key into it.")
        self._transport = Transport(
            self.url, model, api_key_env or "OPENAI_API_KEY", timeout, attempts, backoff
        )
        self.ledger = None if ledger is None else Ledger(ledger)
        self._usage = Usage()
        self.failures: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        self._running: dict[str, Future] = {}
        self._in_a_row = 0

    def __enter__(self) -> "EndpointClient":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the ledger."""
        if self.ledger is not None:
            self.ledger.close()

    @property
    def usage(self) -> Usage:
        """What was asked for so far."""
        return replace(self._usage, retries=self._transport.retries)

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
            if self.failures and not (self._usage.answered or self._usage.cached):
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
                self._usage.cached += 1
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
            self._usage.cached += 1
        else:
            self._usage.failed += 1
            self.failures.append((reply.id, reply.error))

    def _pay(self, request: ChatRequest, messages: list[dict], key: str, stop: threading.Event) -> Reply:
        self._check_budget()
        reply = Reply(request.id)
        try:
            # some servers ignore `n`: ask again for what is missing
            while (missing := request.n - len(reply.texts)) > 0:
                body = self._body(request, messages, missing, len(reply.texts))
                self._add(reply, self._transport.send(body, stop))
        except Refused as error:
            return self._failed(request, error)
        reply.texts, reply.finish_reasons = reply.texts[: request.n], reply.finish_reasons[: request.n]
        if self.ledger is not None:
            record = asdict(reply)
            del record["cached"], record["error"]
            self.ledger.add(key, {"model": self.model, **record})
        with self._lock:
            self._usage.answered += 1
        return reply

    def _failed(self, request: ChatRequest, error: Refused) -> Reply:
        reason = f"request {request.id!r}: {error}"
        with self._lock:
            self._usage.failed += 1
            self.failures.append((request.id, reason))
            self._in_a_row += not error.answered
            first = not (self._usage.answered or self._usage.cached)
            hopeless = (
                first and self._usage.failed >= FAILURES_AT_START
            ) or self._in_a_row >= FAILURES_IN_A_ROW
        if hopeless:
            cure = "is the server up, does the model take images, are the settings right"
            raise UserError(
                f"{self.url}: {self._usage.failed} requests failed, the last: {error}. Check: {cure}?"
            )
        return Reply(request.id, error=reason)

    def _check_budget(self) -> None:
        if self.budget is not None and self._usage.cost >= self.budget:
            kept = "" if self.ledger is None else f" What was answered is kept in {self.ledger.path}."
            raise UserError(
                f"The budget of {self.budget:g} is used up ({self._usage.cost:.4f} spent).{kept} Run again with a larger "
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
            raise Refused(
                f"the answer has no `choices` with messages: {self._transport.clean(answer):.300}"
            ) from error
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
            self._usage.unmetered += not counted
            self._usage.prompt_tokens += prompt
            self._usage.completion_tokens += completion
            self._usage.cost += (prompt * self.input_price + completion * self.output_price) / 1e6


def _from_record(identity: str, record: dict) -> Reply:
    kept = {name: record[name] for name in ("texts", "finish_reasons", "prompt_tokens", "completion_tokens")}
    return Reply(identity, **kept, cached=True)
