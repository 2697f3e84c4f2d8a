"""Asking a model behind any endpoint that speaks OpenAI's `/v1/chat/completions` (vLLM, SGLang, …).

    client = EndpointClient("http://localhost:8000/v1", "Qwen/Qwen2.5-VL-7B-Instruct", ledger="answers.jsonl")
    for reply in client.complete(ChatRequest(row["id"], [user_message(q, ["a.png"])]) for …):
        print(reply.id, reply.texts, reply.error)
    print(client.usage)

Every answer goes into the ledger under a hash of its request, so that a run that was killed, or is run again,
asks (and pays) only for what is missing. No answer is sampled anew for an equal request: ask for `n` samples
or vary `seed`.
"""

import hashlib
import json
import logging
import os
import queue
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .chat_request import ChatRequest, encode_image, user_message, wire_messages
from .endpoint import Answer, ClientSettings, Failure, Server, completions_url, read_answer, retry_after
from .errors import UserError
from .ledger import Ledger
from .settings import configured

LONGEST_BACKOFF = 60.0  # seconds
LONGEST_WAIT = 600.0  # seconds; a server that asks for more is not worth waiting for
REFUSED_AT_START = 8  # so many requests refused before any answer: the settings are wrong
DROPPED_AT_START = 3  # so many that got no answer: the address is wrong
DROPPED_IN_A_ROW = 32  # later: the server has gone
LOCKED_OUT = (401, 403, 404)  # status codes that may mean every request
REFUSED = (400, 415, 422, 500, 501)  # status codes that may mean one field of a request
OPTIONAL = {  # fields that a server may refuse, and what is done without them
    "n": "each answer is asked for by itself",
    "stop": "answers are cut here",
    "seed": "the same request may get another answer",
    "top_p": "answers are drawn from more tokens than asked for",
    "top_k": "answers are drawn from more tokens than asked for",
}
UNPAID = ("cached", "error", "refused")  # fields of a reply that are not kept
HOT = 1.5  # temperature at which two answers must differ
HOT_TOKENS = 64  # of these answers
PROBES = 3  # questions that are asked twice

__all__ = [
    "ChatRequest",
    "EndpointClient",
    "Ledger",
    "Reply",
    "Usage",
    "completions_url",
    "encode_image",
    "retry_after",
    "user_message",
]
logger = logging.getLogger(__name__)


# --- Answers ---


@dataclass
class Reply:
    """Answers to one request: `n` texts, or none and the reason in `error`; `refused` where the server gave the reason
    itself, so that asking again will not help."""

    id: str
    texts: list[str] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: bool = False
    error: str | None = None
    refused: bool = False


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


# --- The client ---


class EndpointClient:
    """Sends chat requests, several at a time, again when they fail for a passing reason, never twice when answered.

    Args:
        base_url: "http://host:8000", "https://host/v1" or the full address of `chat/completions`.
        model: the name that the server knows the model by.
        ledger: JSONL file of answers; None keeps them nowhere.
        options: fields of `ClientSettings`.

    Attributes:
        usage: what was asked for so far.
        left_out: optional fields (OPTIONAL) that the server refuses, so that requests are sent without them.
        failures: id of and reason for each request that got no answer.

    Raises:
        UserError: an address that is none, an option that does not exist or is out of range, a named variable that is
            not set, a ledger in use.
    """

    def __init__(self, base_url: str, model: str, *, ledger: str | Path | None = None, **options: Any):
        self.model = model
        self.settings = settings = configured(ClientSettings, options, "EndpointClient")
        self._key_env = settings.api_key_env or "OPENAI_API_KEY"
        key = os.environ.get(self._key_env, "").strip()
        if settings.api_key_env and not key:
            raise UserError(f"The environment variable {self._key_env} is not set. Put the API key into it.")
        self.server = Server(base_url, key, settings.timeout, settings.longest or 2 * settings.timeout)
        self.url = self.server.url
        self.ledger = None if ledger is None else Ledger(ledger)
        self.usage = Usage()
        self.failures: list[tuple[str, str]] = []
        self._lock = threading.Lock()  # of everything below, and of the counts
        self._running: dict[str, Future] = {}
        self._dropped_in_a_row = 0
        self._not_before = 0.0  # what `Retry-After` says, for all threads
        self._fitting = threading.Lock()  # one thread finds out what the server takes, the others wait
        known = self.ledger and self.ledger.get(self._server_key)
        known = known["server"] if known else {}
        self.left_out = {name for name in known.get("left_out") or () if name in OPTIONAL}
        for name in sorted(self.left_out):
            logger.warning("%s: did not take `%s` before: %s.", self.url, name, OPTIONAL[name])
        self._taken: set[str] = set()  # optional fields that it accepted
        self._varies = known.get("varies") is True  # samples of it differ

    def __enter__(self) -> "EndpointClient":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the ledger."""
        if self.usage.unmetered and (self.settings.input_price or self.settings.output_price):
            logger.warning(
                "%s: %d answers came without a usable count of tokens: the cost, and so the budget, leaves them out.",
                self.url,
                self.usage.unmetered,
            )
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
                while len(pending) < 4 * self.settings.concurrency:
                    request = next(source, None)
                    if request is None:
                        break
                    pending.append(Future())
                    tasks.put((request, pending[-1]))
                    if len(workers) < self.settings.concurrency:
                        # daemons: an interrupted program must not wait for answers that nobody will read
                        worker = threading.Thread(target=self._work, args=(tasks, stop, errors), daemon=True)
                        workers.append(worker)
                        worker.start()
                if not pending:
                    break
                yield pending.popleft().result()
            if self.failures and not (self.usage.answered or self.usage.cached):
                raise UserError(
                    f"{self.url}: no request was answered. {self.failures[-1][1]}. Check address and server."
                )
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
            if record is not None and len(record["texts"]) == request.n:
                self.usage.cached += 1
                names = ("texts", "finish_reasons", "prompt_tokens", "completion_tokens")
                kept = {name: record[name] for name in names if name in record}
                return Reply(request.id, **kept, cached=True)
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
                paid = {name: value for name, value in asdict(reply).items() if name not in UNPAID}
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
        if (budget := self.settings.budget) is not None and self.usage.cost >= budget:
            kept = "" if self.ledger is None else f" What was answered is kept in {self.ledger.path}."
            raise UserError(
                f"The budget of {budget:g} is used up ({self.usage.cost:.4f} spent).{kept} Run again with a larger "
                "budget to go on."
            )
        reply = Reply(request.id)
        try:
            while (missing := request.n - len(reply.texts)) > 0:
                answer = self._fitted(self._body(request, messages, missing, len(reply.texts)), stop)
                reply.texts += answer.texts
                reply.finish_reasons += answer.finish_reasons
                reply.prompt_tokens += answer.prompt_tokens or 0
                reply.completion_tokens += answer.completion_tokens or 0
        except Failure as error:
            return self._failed(request, error)
        reply.texts = [_cut(text, request.stop) for text in reply.texts[: request.n]]
        reply.finish_reasons = reply.finish_reasons[: request.n]
        with self._lock:
            self.usage.answered += 1
        return reply

    def _body(self, request: ChatRequest, messages: list[dict], n: int, answered: int) -> dict:
        """What is sent for `n` more answers when some are there already; some servers give one at a time."""
        body = {"model": self.model, "messages": messages, **request.settings(), "n": n}
        if n == 1:
            del body["n"]
        if answered and request.seed is not None:
            body["seed"] = request.seed + answered
        return body

    def _failed(self, request: ChatRequest, error: Failure) -> Reply:
        words = self.server.without_key(str(error))
        reason = f"request {request.id!r}: {words}"
        with self._lock:
            self.usage.failed += 1
            self.failures.append((request.id, reason))
            dropped = error.again or error.status in LOCKED_OUT
            self._dropped_in_a_row += dropped
            at_start = not (self.usage.answered or self.usage.cached)
            hopeless = at_start and self.usage.failed >= (DROPPED_AT_START if dropped else REFUSED_AT_START)
        if hopeless or self._dropped_in_a_row >= DROPPED_IN_A_ROW:
            cure = "is the server up, does the model take images, are the settings right"
            raise UserError(
                f"{self.url}: {self.usage.failed} requests failed, the last: {words}. Check: {cure}?"
            )
        return Reply(request.id, error=reason, refused=error.answered)

    def _send(self, body: dict, stop: threading.Event, unproven: bool = False) -> Answer:
        """POST until there is an answer, and count what it cost.

        Args:
            unproven: fields may be what is wrong: a status in REFUSED ends it after the second try.

        Raises:
            Failure, or UserError where no request can succeed.
        """
        data = json.dumps(body).encode()
        failure = Failure("the run was stopped.", answered=False)
        for attempt in range(self.settings.attempts):
            pause = self._not_before - time.monotonic()
            if attempt:
                with self._lock:
                    self.usage.retries += 1
                backoff = min(LONGEST_BACKOFF, self.settings.backoff * 2 ** (attempt - 1))
                pause = max(pause, backoff * random.uniform(0.5, 1.0))
            if pause > 0 and stop.wait(pause):
                raise Failure("the run was stopped.", answered=False)
            try:
                answer = read_answer(self.server.post(data))
            except Failure as error:
                failure = error
            else:
                self._count(answer)
                return answer
            if not failure.again:
                raise self._final(failure) from failure
            if unproven and failure.status in REFUSED and attempt:
                raise failure
            if failure.wait > LONGEST_WAIT:
                reason = f"the server asks to come back in {failure.wait:.0f} s. Run again then."
                raise Failure(reason, again=True, answered=False)
            if failure.wait > LONGEST_BACKOFF:
                logger.warning("%s: asks to wait %.0f s.", self.url, failure.wait)
            with self._lock:
                self._not_before = max(self._not_before, time.monotonic() + failure.wait)
        raise Failure(
            f"{self.settings.attempts} attempts failed, the last with {failure}",
            again=True,
            answered=failure.answered,
            status=failure.status,
        )

    def _count(self, answer: Answer) -> None:
        # a count that is missing or none adds nothing: it could take back what others have spent
        prompt, completion = answer.prompt_tokens or 0, answer.completion_tokens or 0
        with self._lock:
            self._dropped_in_a_row = 0
            self.usage.unmetered += answer.prompt_tokens is None or answer.completion_tokens is None
            self.usage.prompt_tokens += prompt
            self.usage.completion_tokens += completion
            self.usage.cost += self._price(prompt, completion)

    def _price(self, prompt: int, completion: int) -> float:
        return (prompt * self.settings.input_price + completion * self.settings.output_price) / 1e6

    def spent(self) -> Usage:
        """`usage`, but answers, tokens and `cost` also of earlier runs with this ledger: what was killed was paid, too."""
        names = ("answered", "prompt_tokens", "completion_tokens")
        totals = Counter(dict.fromkeys(names, 0))
        for record in () if self.ledger is None else self.ledger.answers():
            totals += Counter(answered=1, **{name: record.get(name) or 0 for name in names[1:]})
        # answers that were of no use stand in no ledger
        most = {name: max(totals[name], getattr(self.usage, name)) for name in names}
        return replace(self.usage, **most, cost=self._price(most[names[1]], most[names[2]]))

    def _final(self, failure: Failure) -> Exception:
        """The error of an answer that will not change: of this request alone, or of every request."""
        code = failure.status
        if code is None:
            return failure
        if code in (401, 403) and self.server.key:
            cure = f"The key in {self._key_env} was not accepted."
        elif code in (401, 403):
            cure = f"The server wants an API key: put it into the environment variable {self._key_env}."
        elif code == 404:
            cure = f"Check the address, and that the server knows the model {self.model!r}."
        elif 300 <= code < 400:
            cure = "The server redirects, which is not followed: give the final address."
        else:
            cure = None
        if cure is None or self.usage.answered:
            return Failure(f"{self.url} refused it with {failure}", status=code)
        return UserError(f"{self.url}: {failure}. {cure}")

    # --- What the server can do ---

    def probe(self, requests: Sequence[ChatRequest]) -> dict:
        """Before a run of samples that have to differ: ask twice at a high temperature, which some servers ignore
        without a word.

        Args:
            requests: the first of the run. One of them must get two answers that differ.

        Returns:
            What is done without: `{"left_out": [names of fields]}`.

        Raises:
            UserError: equal answers, or no answer at all.
        """
        trouble = None
        for request in requests if not self._varies else ():
            try:
                self._varies = self._answers_differ(request)
            except Failure as error:
                trouble = error
            if self._varies:
                self._remember()
                break
        if not self._varies and trouble is not None:
            raise UserError(f"{self.url}: no answer to a first request: {trouble}")
        if not self._varies:
            raise UserError(
                f"{self.url}: two answers at temperature {HOT:g} are equal, to each of {len(requests)} questions: the "
                "server ignores `temperature`, so all samples of a question would be the same. Serve the model with vLLM or "
                "SGLang."
            )
        return {"left_out": sorted(self.left_out)}

    def _answers_differ(self, request: ChatRequest) -> bool:
        messages, stop = wire_messages(request)[0], threading.Event()
        tokens = min(HOT_TOKENS, request.max_tokens or HOT_TOKENS)
        hot = replace(request, temperature=max(HOT, request.temperature), max_tokens=tokens)
        texts: list[str] = []
        while len(texts) < 2:
            body = self._body(hot, messages, 2 - len(texts) if request.n > 1 else 1, len(texts))
            try:
                texts += self._fitted(body, stop).texts
            except Failure as error:
                if error.status not in REFUSED or hot.temperature == request.temperature:
                    raise
                hot = replace(hot, temperature=request.temperature)  # some servers take none above 1
        return texts[0] != texts[1]

    def _fitted(self, body: dict, stop: threading.Event) -> Answer:
        """The answer to `body` without the fields that the server refuses."""
        while True:
            sent = {name: value for name, value in body.items() if name not in self.left_out}
            optional = {name for name in OPTIONAL if name in sent}
            try:
                answer = self._send(sent, stop, unproven=not optional <= self._taken)
            except Failure as error:
                if error.status not in REFUSED or not self._find_refused(sent, optional, stop):
                    raise
                continue
            self._taken = self._taken | optional
            if answer.choices < sent.get("n", 1) and "n" not in self.left_out:
                self._leave_out({"n"})
            return answer

    def _find_refused(self, sent: dict, optional: set[str], stop: threading.Event) -> bool:
        """Find out which optional fields of a refused request the server does not take; True where any was learnt."""
        with self._fitting:
            if self.left_out & optional:
                return True  # another thread found out
            unknown = sorted(optional - self._taken)
            base = {name: value for name, value in sent.items() if name not in unknown}
            try:
                if unknown:
                    self._send(base, stop)
            except Failure:
                unknown = []  # it is something else
            refused = set()
            for name in unknown:
                try:
                    self._send(base | {name: sent[name]}, stop, unproven=True)
                    self._taken = self._taken | {name}
                except Failure as error:
                    if error.status not in REFUSED:
                        raise
                    refused.add(name)
            if refused:
                self._leave_out(refused)
            return bool(unknown)

    def _leave_out(self, names: set[str]) -> None:
        for name in sorted(names):
            logger.warning("%s: does not take `%s`: %s.", self.url, name, OPTIONAL[name])
        self.left_out = self.left_out | names  # other threads read the old set
        self._remember()

    @property
    def _server_key(self) -> str:
        return hashlib.sha256(f"server {self.url} {self.model}".encode()).hexdigest()

    def _remember(self) -> None:
        """Keep what was found out, so that a run that goes on asks in the same way."""
        if self.ledger is not None:
            known = {"left_out": sorted(self.left_out), "varies": self._varies}
            self.ledger.add(self._server_key, {"server": known})


def _cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first of these strings: some servers refuse `stop`, or end behind it."""
    return text[: min((at for word in stop if (at := text.find(word)) >= 0), default=len(text))]
