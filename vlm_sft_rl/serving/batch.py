"""One batch for all requests: a request joins while others decode, and its place is free when its answer is complete."""

import copy
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from ..data import chat
from ..decoding.answers import Answer, build_grammar
from ..decoding.config import RetrospectiveConfig, SamplingConfig
from ..decoding.engine import Job
from ..decoding.generate import MACHINES, sampling_options, to_pictures
from ..decoding.machines import Machine, StoppedDecoding
from ..decoding.sampling import Sampler
from ..decoding.vllm_engine import VLLMModel
from ..errors import UserError
from ..models.parts import unwrap
from .engines import TransformersRows, VLLMRows

Listener = Callable[[int, Machine], None]
CUTS = 64  # pairs of top_k and top_p of which the sampler is kept
logger = logging.getLogger(__name__)


class Busy(Exception):
    """No room for a further request."""


class Closed(Exception):
    """The batch takes no requests any more; its text says why."""


@dataclass(frozen=True)
class Prompt:
    """A conversation as the model reads it: what the engine admits, and its token ids, pictures included."""

    inputs: Any
    ids: list[int]
    images: int


class Ticket:
    """A request in the batch.

    Attributes:
        answers: what becomes of it, one `Answer` for each of its jobs.
        listener: told `(number of the answer, machine)` after each step that changed what is committed, or the trace.
    """

    def __init__(self, prompt: Prompt, jobs: list[Job], listener: Listener | None):
        self.prompt, self.jobs, self.listener = prompt, jobs, listener
        self.answers: Future[list[Answer]] = Future()
        self.cancelled = False
        self._told = [(0, 0)] * len(jobs)

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
        model: of transformers, or a `VLLMModel`, which says itself how many answers it decodes side by side.
        rows: answers that are decoded side by side; 1 on a model that cannot rewind its cache.
        waiting: requests that may wait for a row.
    """

    def __init__(self, model, processor, *, rows: int = 32, waiting: int = 64):
        self.waiting = waiting
        self.grammar = build_grammar(unwrap(model), processor, required=False)
        if isinstance(model, VLLMModel):
            self.engine = VLLMRows(model, processor)
        else:
            self.engine = TransformersRows(model, self.grammar, rows)
        options = sampling_options(model, processor, SamplingConfig(), self.grammar)
        self._sampler = lru_cache(CUTS)(
            lambda top_k, top_p: Sampler(**options | {"top_k": top_k, "top_p": top_p})
        )
        # a fast tokenizer must not be used by two threads at once: prompts are encoded with a copy
        self._encoder, self._encoding = copy.deepcopy(processor), threading.Lock()
        self._header, self._encode_insertion = chat.header_ids(processor), chat.insertion_encoder(processor)
        self._queue: deque[Ticket] = deque()
        self._live: list[Ticket] = []
        self._changed = threading.Condition()
        self._closing = ""  # why no more requests are taken
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
            inputs, ids = self.engine.read(self._encoder, text, pictures)
        longest = self.engine.longest
        if longest and len(ids) >= longest:
            raise UserError(
                f"The conversation has {len(ids)} tokens, pictures included; this model takes {longest} with the "
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
        if n > self.engine.size:
            raise UserError(f"n = {n}: at most {self.engine.size} answers are decoded side by side.")
        if longest := self.engine.longest:
            config = replace(config, max_new_tokens=min(config.max_new_tokens, longest - len(prompt.ids)))
        jobs = [self._job(prompt, config, f"0#{k}" if n > 1 else "0", stop) for k in range(n)]
        ticket = Ticket(prompt, jobs, listener)
        with self._changed:
            if self._closing:
                raise Closed(self._closing)
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

    @property
    def alive(self) -> bool:
        """Whether requests that were taken are still worked on."""
        return self._thread.is_alive()

    def close(self, seconds: float) -> bool:
        """Take no more requests and finish those that were taken; whether that was done in time."""
        with self._changed:
            self._closing = self._closing or "The server is being stopped."
            self._changed.notify()
        self._thread.join(seconds)
        return not self.alive

    # --- In the thread of the batch ---

    def _job(self, prompt: Prompt, config: SamplingConfig, name: str, stop: Sequence[str]) -> Job:
        if isinstance(config, RetrospectiveConfig):
            machine = MACHINES[config.rules](config, self.grammar)
        else:
            machine = StoppedDecoding(config, self.grammar, stop)
        sampler = self._sampler(config.top_k, config.top_p)
        job = Job(machine, name, images=prompt.images, sampler=sampler)
        if machine.rewrites:
            job.header, job.encode_insertion = self._header, self._encode_insertion
            if prompt.ids[-len(job.header) :] != job.header:
                raise UserError(
                    "The conversation does not end with the header that the chat template gives an answer, so the question "
                    "cannot be rewritten. Let the user's message be the last, or send `rewrite_query: false`."
                )
        return job

    def _run(self) -> None:
        try:
            with self.engine.running():
                while self._admit():
                    if self._live:
                        self._advance()
        except Exception as error:  # the engine could not even be cleared
            logger.exception("Decoding has ended")
            self._abandon(error)

    def _abandon(self, error: Exception) -> None:
        """Answer everybody who waits with an error, and take no more requests."""
        with self._changed:
            self._closing = (
                "Decoding has ended by an error, which the server's log has. Start the server again."
            )
            waiting = [t for t in self._queue if t.answers.set_running_or_notify_cancel()]
            self._queue.clear()
        for ticket in self._live + waiting:
            ticket.answers.set_exception(error)
        self._live.clear()

    def _admit(self) -> bool:
        """Let tickets in, first come, first served; waits while there is nothing to do. False: all is done."""
        with self._changed:
            while not (self._queue or self._live or self._closing):
                self._changed.wait()
            if self._closing and not (self._queue or self._live):
                return False
            for ticket in [ticket for ticket in self._live if ticket.cancelled]:
                self._give_up(ticket, CancelledError())
            entering, free = [], self.engine.size - sum(len(ticket.jobs) for ticket in self._live)
            while self._queue and len(self._queue[0].jobs) <= free:
                ticket = self._queue.popleft()
                # from here on its future cannot be cancelled behind our back
                if ticket.cancelled or not ticket.answers.set_running_or_notify_cancel():
                    ticket.answers.cancel()
                    continue
                free -= len(ticket.jobs)
                entering.append(ticket)
        for ticket in entering:
            self._live.append(ticket)
            try:
                self.engine.admit(ticket.jobs, ticket.prompt.inputs)
            except Exception as error:
                if not isinstance(error, UserError):
                    logger.exception("A prompt could not be read")
                self._give_up(ticket, error)
        return True

    def _give_up(self, ticket: Ticket, error: Exception) -> None:
        self._live.remove(ticket)
        for job in ticket.jobs:
            self.engine.remove(job)
        ticket.answers.set_exception(error)

    def _advance(self) -> None:
        """One token for each row; tell the listeners, and hand over what is finished."""
        try:
            failed = {id(job): error for job, error in self.engine.step()}
        except Exception as error:  # out of memory, or logits that are no numbers
            logger.exception(
                "A step of decoding failed: %d requests are answered with an error", len(self._live)
            )
            for ticket in self._live:
                ticket.answers.set_exception(error)
            self._live.clear()
            self.engine.clear()
            return
        running = {id(row.job) for row in self.engine.rows}
        for ticket in list(self._live):
            jobs = set(map(id, ticket.jobs))
            if error := next((failed[job] for job in jobs & failed.keys()), None):
                self._give_up(ticket, error)
                continue
            ticket.tell()
            if running.isdisjoint(jobs):
                self._live.remove(ticket)
                ticket.answers.set_result([job.answer() for job in ticket.jobs])
