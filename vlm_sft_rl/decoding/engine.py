"""The batched decoding loop: many state machines over one backend.

Every step each live row samples one token from its own logits and feeds it. A rewind to the last checkpoint samples
again from the logits saved there, in the same step and without a forward pass. Rows whose question was rewritten
recompute hint, header and accepted text together, as one ragged chunk; the others do not wait for them. Finished rows
are dropped and new prompts take their places.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .backends import Chunk
from .grammar import Grammar
from .prefill import Prefill
from .records import Counts
from .retrospective import CONTINUE, FINISH
from .sampling import Sampler, row_rng


@dataclass
class Job:
    """One answer to decode.

    Attributes:
        machine: the state machine (`Retrospective`, `ReleasedRetrospective` or `Observer`).
        id: names the row's random stream.
        header: ids of the assistant header at the end of the prompt (needed only when questions are rewritten).
        encode_insertion: text -> ids to put before the header.
        images: how many images the prompt has.
    """

    machine: Any
    id: str
    header: list[int] = field(default_factory=list)
    encode_insertion: Callable[[str], list[int]] | None = None
    images: int = 0
    counts: Counts = field(default_factory=Counts)


class _Row:
    """A job with its place in the backend. `base`: tokens before the answer; `pending`: tokens not yet fed."""

    def __init__(self, job: Job, prompt: list[int], seed: int):
        self.job, self.machine = job, job.machine
        self.rng = row_rng(seed, job.id)
        self.prompt = prompt
        self.cut = len(prompt) - len(job.header)
        self.base = len(prompt)
        self.insertion: list[int] = []
        self.pending: list[int] = []
        self.prompt_part = 0
        self.ready = True
        self.waited = 0
        self.saved: torch.Tensor | None = None
        self.saved_at = -1
        self.drafts: list[Any] = []

    @property
    def temperature(self) -> float:
        return self.machine.temperature


class Engine:
    """Runs jobs on a backend.

    Args:
        load: indices of jobs -> `(Prefill, inputs)` of exactly these rows, in this order.
        chunk_patience: steps a row with a rewritten question may wait so that several share one forward pass.
    """

    def __init__(
        self,
        backend,
        grammar: Grammar,
        sampler: Sampler,
        load: Callable[[Sequence[int]], tuple[Prefill, Any]],
        *,
        batch_size: int,
        seed: int = 0,
        parallel_attempts: int = 1,
        chunk_patience: int = 4,
    ):
        self.backend, self.grammar, self.sampler, self.load = backend, grammar, sampler, load
        self.batch_size, self.seed = batch_size, seed
        self.parallel_attempts, self.chunk_patience = parallel_attempts, chunk_patience
        self.rows: list[_Row] = []
        self.logits: torch.Tensor | None = None

    @torch.inference_mode()
    def run(self, jobs: list[Job], order: Sequence[int] | None = None) -> None:
        """Decode all jobs; results are in their machines and counts."""
        queue = list(order if order is not None else range(len(jobs)))[::-1]
        while queue or self.rows:
            free = self.batch_size - len(self.rows)
            # refill a quarter of the batch at a time: one prefill per finished row would be mostly overhead
            if queue and (not self.rows or free >= min(len(queue), max(1, self.batch_size // 4))):
                self._admit(jobs, [queue.pop() for _ in range(min(free, len(queue)))])
            self._sample()
            if self.rows:
                self._forward()

    def _admit(self, jobs: list[Job], indices: list[int]) -> None:
        start, inputs = self.load(indices)
        self.backend.add(start, inputs)
        for index, prompt in zip(indices, start.prompts, strict=True):
            job = jobs[index]
            job.counts.prompt_tokens = len(prompt)
            job.counts.tokens_forwarded += len(prompt)
            job.counts.forwards += 1
            job.counts.image_encodes += job.images
            self.rows.append(_Row(job, prompt, self.seed))
        self.logits = start.logits if self.logits is None else torch.cat([self.logits, start.logits])

    def _sample(self) -> None:
        rows = self.rows
        ready = [i for i, row in enumerate(rows) if row.ready]
        everyone = len(ready) == len(rows)
        logits = self.logits if everyone else self.logits[ready]
        finished = []
        tokens = self.sampler.choose(logits, rows if everyone else [rows[i] for i in ready])
        for i, token in zip(ready, tokens, strict=True):
            row = rows[i]
            machine = row.machine
            if len(machine.ids) == machine.checkpoint and row.saved_at != machine.checkpoint:
                row.saved, row.saved_at = self.logits[i].clone(), machine.checkpoint
            if self._advance(i, row, token, self.logits[i]) == FINISH:
                finished.append(i)
        for i in reversed(finished):
            self._drop(i)

    def _advance(self, i: int, row: _Row, token: int, logits: torch.Tensor) -> str:
        """Give the token to the machine; sample again, as often as it rewinds to logits at hand."""
        closes, machine = self.grammar.closes, row.machine
        while True:
            p = self.sampler.p_unconfident(logits, row, self.grammar.unconfident) if token in closes else None
            action = machine.observe(token, p)
            if action == CONTINUE:
                row.pending = [machine.ids[-1]]
                row.ready = False
                return CONTINUE
            if action == FINISH:
                return FINISH
            if action.rewrite:
                self._rewrite(i, row)
                return CONTINUE
            if row.saved_at != action.length:
                self._refeed(i, row, action.length)
                return CONTINUE
            self.backend.rewind(i, row.base + action.length)
            logits = row.saved
            token = self.sampler.choose(logits.unsqueeze(0), [row])[0]

    def _refeed(self, i: int, row: _Row, length: int) -> None:
        """Go back to a length whose logits were not kept: its last token is fed once more."""
        self.backend.rewind(i, row.base + length - 1)
        if length:
            row.pending = [row.machine.ids[length - 1]]
        else:
            row.pending, row.prompt_part = [row.prompt[-1]], 1
        row.ready = False

    def _rewrite(self, i: int, row: _Row) -> None:
        """The question changed: everything from the end of the question on is computed again."""
        job = row.job
        text = row.machine.insertion
        row.insertion = job.encode_insertion(text) if text else []
        row.base = row.cut + len(row.insertion) + len(job.header)
        row.prompt_part = len(row.insertion) + len(job.header)
        self.backend.rewind(i, row.cut)
        row.pending = row.insertion + job.header + row.machine.ids
        row.saved_at = -1
        row.ready = False

    def _forward(self) -> None:
        rows = self.rows
        tokens: list[int | None] = [None] * len(rows)
        chunks, busy = [], 0
        for i, row in enumerate(rows):
            pending = row.pending
            if len(pending) == 1 and not row.prompt_part:
                tokens[i] = pending[0]
                busy += 1
                self._count(row)
            else:
                chunks.append(i)
                row.waited += 1
        if chunks and busy and not self._chunks_due(chunks, busy):
            chunks = []
        if busy:
            logits = self.backend.decode(tokens)
            if busy < len(rows):
                idle = [i for i, token in enumerate(tokens) if token is None]
                logits[idle] = self.logits[idle]
            self.logits = logits
        if chunks:
            for i in chunks:
                self._count(rows[i])
            part = self.backend.extend([Chunk(i, rows[i].pending, rows[i].prompt_part) for i in chunks])
            self.logits[chunks] = part
        for i, row in enumerate(rows):
            if tokens[i] is not None or i in chunks:
                row.pending, row.prompt_part, row.ready, row.waited = [], 0, True, 0

    def _chunks_due(self, chunks: list[int], busy: int) -> bool:
        return len(chunks) >= busy or max(self.rows[i].waited for i in chunks) > self.chunk_patience

    def _count(self, row: _Row) -> None:
        row.job.counts.tokens_forwarded += len(row.pending)
        row.job.counts.forwards += 1

    def _drop(self, i: int) -> None:
        self.backend.remove(i)
        last = len(self.rows) - 1
        if i != last:
            self.rows[i] = self.rows[last]
            self.logits[i] = self.logits[last]
        self.rows.pop()
        self.logits = self.logits[:last]
