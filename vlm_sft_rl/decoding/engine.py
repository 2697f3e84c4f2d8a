"""The batched decoding loop: many state machines over one backend.

Every step each live row samples one token from its own logits and feeds it. A rewind to the last checkpoint samples
again from the logits saved there, in the same step and without a forward pass. Rows whose question was rewritten
recompute hint, header and accepted text together, as one ragged chunk; the others do not wait for them. Finished rows
are dropped and new prompts take their places.

With parallel attempts a resampled row gets drafts: copies that decode the next attempts at the same time. When the
row's own attempt is rejected it takes over a draft, keys included, wherever that draft has come to.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .answers import Counts, Grammar
from .cache import Chunk, Prefill
from .retrospective import CONTINUE, FINISH, Feed, Rewind
from .sampling import Sampler, row_rng


@dataclass
class Job:
    """One answer to decode.

    Attributes:
        machine: the state machine (`Retrospective`, `ReleasedRetrospective` or `PlainDecoding`).
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
        self.drafts: list[_Row] = []
        self.dead = False

    @property
    def temperature(self) -> float:
        return self.machine.temperature


class SpeculativeAttempt:
    """The machine of a draft: collects tokens until something must be judged; the owner's machine will judge it."""

    def __init__(self, owner: Any, grammar: Grammar):
        self.ids = owner.ids[:]
        self.temperature = owner.temperature
        self.events: list[tuple[int, float | None]] = []
        self.checkpoint = -1
        self._open: int | None = None
        self._limit = owner.config.max_new_tokens
        self._grammar = grammar

    def observe(self, token: int, p_unconfident: float | None = None) -> str:
        self.events.append((token, p_unconfident))
        self.ids.append(token)
        if token == self._grammar.open and self._open is None:
            self._open = len(self.ids) - 1
        elif token in self._grammar.watched:
            return FINISH
        return FINISH if len(self.ids) >= self._limit else CONTINUE


class Engine:
    """Runs jobs on a backend.

    Args:
        load: indices of jobs -> `(Prefill, inputs)` of exactly these rows, in this order.
        chunk_patience: steps a row with a rewritten question may wait so that several share one forward pass.
        copies: answers per loaded prompt; job i * copies + c is copy c of prompt i. All share one prefill, images included.
        load_size: most prompts that are loaded in one pass; None: all that there is room for.
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
        copies: int = 1,
        load_size: int | None = None,
    ):
        self.backend, self.grammar, self.sampler, self.load = backend, grammar, sampler, load
        self.batch_size, self.seed = batch_size, seed
        self.parallel_attempts, self.chunk_patience = parallel_attempts, chunk_patience
        self.copies, self.load_size = copies, load_size
        self.rows: list[_Row] = []
        self.logits: torch.Tensor | None = None

    @torch.inference_mode()
    def run(self, jobs: list[Job], order: Sequence[int] | None = None) -> None:
        """Decode all jobs, prompts in `order`; results are in their machines and counts."""
        queue = list(order if order is not None else range(len(jobs) // self.copies))[::-1]
        size = max(1, self.batch_size // self.copies)
        while queue or self.rows:
            live = sum(not isinstance(row.machine, SpeculativeAttempt) for row in self.rows)
            free = size if not live else (self.batch_size - live) // self.copies
            # refill a quarter of the batch at a time: one prefill per finished row would be mostly overhead
            if queue and (not self.rows or free >= min(len(queue), max(1, size // 4))):
                admitted = [queue.pop() for _ in range(min(free, len(queue)))]
                step = self.load_size or len(admitted)
                for first in range(0, len(admitted), step):
                    self._admit(jobs, admitted[first : first + step])
            self._sample()
            if self.rows:
                self._forward()

    def _admit(self, jobs: list[Job], indices: list[int]) -> None:
        start, inputs = self.load(indices)
        self.backend.add(start, inputs)
        leaders = len(self.rows)
        forwarded = start.forwarded or [len(prompt) for prompt in start.prompts]
        for index, prompt, fed in zip(indices, start.prompts, forwarded, strict=True):
            job = jobs[index * self.copies]
            job.counts.tokens_forwarded += fed
            job.counts.forwards += 1
            job.counts.image_encodes += job.images
            self.rows.append(_Row(job, prompt, self.seed))
        logits = start.logits
        if self.copies > 1:
            self.backend.reserve(len(self.rows) + len(indices) * (self.copies - 1))
            for place, index in enumerate(indices):
                for copy in range(1, self.copies):
                    self.backend.fork(leaders + place)
                    self.rows.append(_Row(jobs[index * self.copies + copy], start.prompts[place], self.seed))
            logits = torch.cat([logits, logits.repeat_interleave(self.copies - 1, 0)])
        for row in self.rows[leaders:]:
            row.job.counts.prompt_tokens = len(row.prompt)
        self.logits = logits if self.logits is None else torch.cat([self.logits, logits])

    def _sample(self) -> None:
        rows = self.rows
        # drafts first: when an owner's attempt fails, its drafts have taken this step already
        ready = sorted(
            (i for i, row in enumerate(rows) if row.ready),
            key=lambda i: not isinstance(rows[i].machine, SpeculativeAttempt),
        )
        everyone = ready == list(range(len(rows)))
        logits = self.logits if everyone else self.logits[ready]
        tokens = self.sampler.choose(logits, rows if everyone else [rows[i] for i in ready])
        # one pass over the vocabulary for all rows that want it: a row at a time, each would wait for the device
        wanted = any(_wants_probability(rows[i].machine) for i in ready)
        known = self.sampler.probabilities(logits, tokens) if wanted else [None] * len(ready)
        for i, token, p in zip(ready, tokens, known, strict=True):
            row, own = rows[i], self.logits[i]
            machine = row.machine
            if len(machine.ids) == machine.checkpoint:
                if row.saved_at != machine.checkpoint:
                    row.saved, row.saved_at = own.clone(), machine.checkpoint
                self._draft(i, row)
            row.dead |= self._advance(i, row, token, own, p) == FINISH
        for i in range(len(rows) - 1, -1, -1):
            if rows[i].dead:
                self._drop(i)

    def _advance(
        self, i: int, row: _Row, token: int, logits: torch.Tensor, known: float | None = None
    ) -> str:
        """Give the token, whose probability may be `known`, to the machine; sample again, as often as it rewinds to
        logits at hand."""
        closes, machine = self.grammar.closes, row.machine
        while True:
            p = None
            if token in closes:
                p = self.sampler.p_unconfident(logits, row, self.grammar.unconfident)
            elif _wants_probability(machine):
                p = self.sampler.probabilities(logits.unsqueeze(0), [token])[0] if known is None else known
            action = machine.observe(token, p)
            if isinstance(action, Feed):
                row.pending, row.ready = list(action.tokens), False
                return CONTINUE
            if isinstance(machine, SpeculativeAttempt):
                row.pending, row.ready = [token] if action == CONTINUE else [], False
                return CONTINUE
            while row.drafts and action not in (CONTINUE, FINISH) and self._same_group(row, action):
                action = self._take_over(i, row)
            if action in (CONTINUE, FINISH):
                if row.drafts and (action == FINISH or not machine.correcting):
                    self._discard(row)
                if action == CONTINUE and row.ready:
                    row.pending, row.ready = [machine.ids[-1]], False
                return action
            self._discard(row)
            if action.rewrite:
                self._rewrite(i, row)
                return CONTINUE
            if row.saved_at != action.length:
                self._refeed(i, row, action.length)
                return CONTINUE
            self.backend.rewind(i, row.base + action.length)
            self._draft(i, row)
            logits = row.saved
            token, known = self.sampler.choose(logits.unsqueeze(0), [row])[0], None

    def _draft(self, i: int, row: _Row) -> None:
        """Start the other attempts of a group beside the row's own."""
        machine = row.machine
        if self.parallel_attempts == 1 or row.drafts or not getattr(machine, "correcting", False):
            return
        for number in range(1, self.parallel_attempts - machine.group_failures):
            at = self.backend.fork(i)
            draft = _Row(row.job, row.prompt, self.seed)
            draft.machine, draft.base, draft.cut, draft.insertion = (
                SpeculativeAttempt(machine, self.grammar),
                row.base,
                row.cut,
                row.insertion,
            )
            draft.rng = row_rng(self.seed, f"{row.job.id}\x1f{row.rng.random()}\x1f{number}")
            self.rows.append(draft)
            row.drafts.append(draft)
            self.logits = torch.cat([self.logits, row.saved.unsqueeze(0)])
            token = self.sampler.choose(row.saved.unsqueeze(0), [draft])[0]
            self._advance(at, draft, token, row.saved)

    def _same_group(self, row: _Row, action: Rewind) -> bool:
        return not action.rewrite and row.machine.group_failures > 0 and action.length == row.saved_at

    def _take_over(self, i: int, row: _Row) -> Any:
        """Continue the row with its next draft; returns the machine's last action."""
        draft = row.drafts.pop(0)
        draft.dead = True
        start = row.base + row.machine.checkpoint
        action: Any = CONTINUE
        for token, p in draft.machine.events:
            action = row.machine.observe(token, p)
            if action != CONTINUE:
                return action
        self.backend.adopt(self.rows.index(draft), i, start)
        return action

    def _discard(self, row: _Row) -> None:
        for draft in row.drafts:
            draft.dead = True
        row.drafts = []

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
            elif pending:
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


def _wants_probability(machine: Any) -> bool:
    """Whether a machine is told the probability of each of its tokens."""
    return getattr(machine, "every_probability", False)
