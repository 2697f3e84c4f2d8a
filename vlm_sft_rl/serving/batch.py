"""One batch for all requests: a request joins while others decode, and its place is free when its answer is complete."""

import copy
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..data import chat
from ..decoding.answers import Answer, build_grammar
from ..decoding.cache import prefill
from ..decoding.capabilities import choose_backend, rewindable_attention
from ..decoding.config import RetrospectiveConfig, SamplingConfig
from ..decoding.engine import Engine, Job
from ..decoding.generate import MACHINES, encode_batch, sampling_options, to_pictures
from ..decoding.machines import Machine, StoppedDecoding
from ..decoding.sampling import Sampler
from ..errors import UserError
from ..models.parts import unwrap

Listener = Callable[[int, Machine], None]
logger = logging.getLogger(__name__)


class Busy(Exception):
    """No room for a further request."""


class Closed(Exception):
    """The batch takes no requests any more."""


@dataclass(frozen=True)
class Prompt:
    """A conversation as the model reads it: the processor's tensors of one row, and their token ids."""

    inputs: dict[str, Any]
    ids: list[int]
    images: int


class Ticket:
    """A request in the batch.

    Attributes:
        answers: what becomes of it, one `Answer` for each of its jobs.
        listener: told `(number of the answer, machine)` after each step that changed what is committed, or the trace.
        started: when its first token could be drawn, by `time.monotonic`.
    """

    def __init__(self, prompt: Prompt, jobs: list[Job], listener: Listener | None):
        self.prompt, self.jobs, self.listener = prompt, jobs, listener
        self.answers: Future[list[Answer]] = Future()
        self.started: float | None = None
        self.cancelled = False
        self._told = [(0, 0)] * len(jobs)

    @property
    def config(self) -> SamplingConfig:
        return self.jobs[0].machine.config

    def tell(self) -> None:
        """Call the listener for what changed."""
        for number, job in enumerate(self.jobs if self.listener else ()):
            state = (job.machine.committed, len(job.machine.trace))
            if state != self._told[number]:
                self._told[number] = state
                self.listener(number, job.machine)


class ContinuousBatch:
    """Decodes tickets in a thread of its own.

    Args:
        rows: answers that are decoded side by side; 1 on a model that cannot rewind its cache.
        waiting: requests that may wait for a row.
        longest: most tokens of a prompt and its answer; default: what the model's configuration says.
    """

    def __init__(self, model, processor, *, rows: int = 32, waiting: int = 64, longest: int | None = None):
        self.model, self.processor, self.waiting = model, processor, waiting
        self.grammar = build_grammar(unwrap(model), processor, required=False)
        with rewindable_attention(model), torch.inference_mode():
            self.rows = rows if choose_backend(model).keeps_keys else 1
        text_config = unwrap(model).config.get_text_config()
        self.longest = longest or getattr(text_config, "max_position_embeddings", None)
        # a fast tokenizer must not be used by two threads at once: prompts are encoded with a copy
        self._encoder, self._encoding = copy.deepcopy(processor), threading.Lock()
        self._header, self._encode_insertion = chat.header_ids(processor), chat.insertion_encoder(processor)
        self._queue: deque[Ticket] = deque()
        self._live: list[Ticket] = []
        self._engines: dict[tuple, Engine] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self._thread.start()

    # --- Called from other threads ---

    def encode(self, messages: list[dict], images: list) -> Prompt:
        """A conversation of typed messages as the model reads it.

        Raises UserError: the template or the processor refuses it, or it leaves no room for an answer.
        """
        pictures = to_pictures(images) if images else []
        with self._encoding:
            text = chat.render_messages(self._encoder, messages)
            inputs = encode_batch(self.model, self._encoder, [text], [pictures])
        ids = inputs["input_ids"][0].tolist()
        if self.longest and len(ids) >= self.longest:
            raise UserError(
                f"The conversation has {len(ids)} tokens, pictures included; this model takes {self.longest} with the "
                "answer. Shorten it."
            )
        return Prompt(inputs, ids, len(pictures))

    def submit(
        self,
        prompt: Prompt,
        config: SamplingConfig,
        *,
        n: int = 1,
        stop: Sequence[str] = (),
        listener: Listener | None = None,
    ) -> Ticket:
        """Queue a request for `n` answers.

        Raises:
            Busy: as many requests wait as may. Closed: the batch is closing.
            UserError: more answers than rows, no room for an answer, or a prompt whose question cannot be rewritten.
        """
        if n > self.rows:
            raise UserError(f"n = {n}: at most {self.rows} answers are decoded side by side.")
        if self.longest:
            config = replace(
                config, max_new_tokens=min(config.max_new_tokens, self.longest - len(prompt.ids))
            )
        jobs = [self._job(prompt, config, f"0#{k}" if n > 1 else "0", stop) for k in range(n)]
        ticket = Ticket(prompt, jobs, listener)
        with self._changed:
            if self._closing:
                raise Closed
            if len(self._queue) >= self.waiting:
                raise Busy
            self._queue.append(ticket)
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Its client has gone: the rows are freed before the next step."""
        with self._changed:
            ticket.cancelled = True
            self._changed.notify()

    def counts(self) -> tuple[int, int]:
        """Answers that are decoded, and requests that wait."""
        return sum(len(ticket.jobs) for ticket in self._live), len(self._queue)

    def close(self, seconds: float) -> bool:
        """Take no more requests and finish those that were taken; whether that was done in time."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    # --- In the thread of the batch ---

    def _job(self, prompt: Prompt, config: SamplingConfig, name: str, stop: Sequence[str]) -> Job:
        if isinstance(config, RetrospectiveConfig):
            machine = MACHINES[config.rules](config, self.grammar)
        else:
            machine = StoppedDecoding(config, self.grammar, stop)
        job = Job(machine, name, images=prompt.images)
        if machine.rewrites:
            job.header, job.encode_insertion = self._header, self._encode_insertion
            if prompt.ids[-len(job.header) :] != job.header:
                raise UserError(
                    "The conversation does not end with the header that the chat template gives an answer, so the question "
                    "cannot be rewritten. Let the user's message be the last, or send `rewrite_query: false`."
                )
        return job

    def _run(self) -> None:
        with rewindable_attention(self.model), torch.inference_mode():
            while self._admit():
                for key, engine in list(self._engines.items()):
                    self._advance(key, engine)

    def _admit(self) -> bool:
        """Let tickets in, first come, first served; waits while there is nothing to do. False: all is done."""
        with self._changed:
            while not (self._queue or self._live or self._closing):
                self._changed.wait()
            if self._closing and not (self._queue or self._live):
                return False
            for ticket in [ticket for ticket in self._live if ticket.cancelled]:
                self._live.remove(ticket)
                for job in ticket.jobs:
                    self._engine(ticket.config).remove(job)
                ticket.answers.set_exception(CancelledError())
            entering, free = [], self.rows - sum(len(ticket.jobs) for ticket in self._live)
            while self._queue and len(self._queue[0].jobs) <= free:
                ticket = self._queue.popleft()
                # from here on its future cannot be cancelled behind our back
                if ticket.cancelled or not ticket.answers.set_running_or_notify_cancel():
                    ticket.answers.cancel()
                    continue
                free -= len(ticket.jobs)
                entering.append(ticket)
        for ticket in entering:
            self._enter(ticket)
        return True

    def _enter(self, ticket: Ticket) -> None:
        try:
            engine = self._engine(ticket.config)
            start = prefill(self.model, ticket.prompt.inputs, own_cache=engine.backend.keeps_keys)
            for number, job in enumerate(ticket.jobs):
                if number:  # the image was encoded and the prompt read for the first one
                    job.images, start = 0, replace(start, forwarded=[0])
                engine.admit([[job]], start)
            if engine.backend.keeps_keys:
                engine.backend.reserve(self.rows)
        except Exception as error:
            logger.exception("A prompt could not be read")
            for job in ticket.jobs:
                engine.remove(job)
            ticket.answers.set_exception(error)
        else:
            ticket.started = time.monotonic()
            self._live.append(ticket)

    def _engine(self, config: SamplingConfig) -> Engine:
        """Rows that cut the distribution in the same way are one batch; other settings belong to a row."""
        key = (config.top_k, config.top_p)
        if key not in self._engines:
            sampler = Sampler(**sampling_options(self.model, self.processor, config, self.grammar))
            self._engines[key] = Engine(choose_backend(self.model), self.grammar, sampler)
        return self._engines[key]

    def _advance(self, key: tuple, engine: Engine) -> None:
        """One token for each row of an engine; tell the listeners, and hand over what is finished."""
        if not engine.rows:
            if len(self._engines) > 1:
                del self._engines[key]  # and its cache
            return
        tickets = [ticket for ticket in self._live if (ticket.config.top_k, ticket.config.top_p) == key]
        try:
            engine.step()
        except Exception as error:  # out of memory, or logits that are no numbers
            logger.exception(
                "A step of decoding failed: %d requests are answered with an error", len(tickets)
            )
            del self._engines[key]
            for ticket in tickets:
                self._live.remove(ticket)
                ticket.answers.set_exception(error)
            return
        running = {id(row.job) for row in engine.rows}
        for ticket in tickets:
            ticket.tell()
            if running.isdisjoint(map(id, ticket.jobs)):
                self._live.remove(ticket)
                ticket.answers.set_result([job.answer() for job in ticket.jobs])
