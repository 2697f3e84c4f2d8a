"""The batched decoding loop: many state machines over one backend.

Every step each live row samples one token from its own logits and feeds it. A rewind to the last checkpoint samples
again from the logits saved there, in the same step and without a forward pass. Rows whose question was rewritten
recompute hint, header and accepted text together, as one ragged chunk; the others do not wait for them. Finished rows
are dropped and new prompts take their places.

With parallel attempts a rejected row gets speculative attempts: copies that decode its next resamplings at the same time.
When the row's own attempt is rejected it takes over one of them, keys included, wherever it has come to.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ..errors import UserError
from .answers import Answer, Counts, Grammar
from .cache import Chunk, Prefill
from .machines import CONTINUE, FINISH, Action, Feed, Machine, Rewind
from .sampling import Sampler, place_of, row_rng

CHUNK_PATIENCE = (
    4  # steps that a row with a rewritten question may wait, so that several share one forward pass
)


@dataclass
class Job:
    """One answer to decode.

    Attributes:
        id: names the row's random stream.
        sampler: how its tokens are chosen.
        images: how many images its prefill encodes.
        header: ids of the assistant header at the end of the prompt, and
        encode_insertion: text -> ids to put before it; only for machines that rewrite the question.
    """

    machine: Machine
    id: str
    prompt: str = ""
    images: int = 0
    sampler: Sampler = field(default_factory=Sampler)
    header: list[int] = field(default_factory=list)
    encode_insertion: Callable[[str], list[int]] | None = None
    counts: Counts = field(default_factory=Counts)

    def answer(self) -> Answer:
        answer = self.machine.answer()
        self.counts.tokens_kept = answer.counts.tokens_kept
        answer.counts, answer.prompt, answer.id = self.counts, self.prompt, self.id
        answer.threshold = self.machine.threshold
        return answer


class SpeculativeAttempt(Machine):
    """Collects the tokens of an attempt until something must be judged; its owner's machine will judge it."""

    checkpoint = -1

    def __init__(self, owner: Machine):
        super().__init__(owner.config, owner.grammar)
        self.ids, self.temperature = owner.ids[:], owner.temperature
        self.law_temperature = owner.law_temperature
        self.tried = owner.tried.branch() if owner.tried is not None else None
        self.events: list[tuple[int, float | None]] = []
        self._open = False

    def observe(self, token: int, probability: float | None = None) -> Action:
        self.events.append((token, probability))
        self.ids.append(token)
        if token == self.grammar.open and not self._open:
            self._open = True
        elif token in self.grammar.watched:
            return FINISH
        if self.tried is not None:
            self.tried.step(token)
        return FINISH if len(self.ids) >= self.config.max_new_tokens else CONTINUE


class Row:
    """A job with its place in the backend: row i of the engine is row i of the backend.

    Raises UserError: the prompt does not end with the job's header.

    Attributes:
        cut: tokens of the prompt before the header; base: tokens before the answer.
        insertion: ids between them, where the question was rewritten.
        pending: tokens not yet fed, of which the first `prompt_part` belong to the prompt.
        ready: its logits are those of the next token.
        waited: steps that its chunk has waited.
        saved: logits at length `saved_at` of the answer, to sample from again.
        attempts: the speculative ones, in order.
    """

    def __init__(self, job: Job, prompt: list[int], rng):
        self.job, self.machine, self.prompt, self.rng = job, job.machine, prompt, rng
        self.cut, self.base = len(prompt) - len(job.header), len(prompt)
        if prompt[self.cut :] != job.header:
            raise UserError(
                "A prompt does not end with the assistant header that the chat template produces, so the place for "
                "the hint is unknown. Let the template put a special token or a space after the user's text."
            )
        self.insertion: list[int] = []
        self.pending: list[int] = []
        self.prompt_part = self.waited = 0
        self.ready = True
        self.saved: torch.Tensor | None = None
        self.saved_at = -1
        self.attempts: list[Row] = []
        self.finished = False

    @property
    def temperature(self) -> float:
        return self.machine.temperature

    @property
    def place(self) -> str:
        return place_of(self.job.id, len(self.machine.ids))

    @property
    def logit_bias(self) -> dict[int, float]:
        return self.machine.logit_bias()

    @property
    def speculative(self) -> bool:
        return isinstance(self.machine, SpeculativeAttempt)


def draw(logits: torch.Tensor, rows: Sequence[Row]) -> list[int]:
    """The next token of each row; what was tried is told how probable that is. `logits` is `(rows, vocabulary)`."""
    samplers = {id(row.job.sampler): row.job.sampler for row in rows}
    if len(samplers) == 1:
        return _draw(rows[0].job.sampler, logits, rows)
    tokens = [0] * len(rows)
    for sampler in samplers.values():
        places = [i for i, row in enumerate(rows) if row.job.sampler is sampler]
        for i, token in zip(places, _draw(sampler, logits[places], [rows[i] for i in places]), strict=True):
            tokens[i] = token
    return tokens


def _draw(sampler: Sampler, logits: torch.Tensor, rows: Sequence[Row]) -> list[int]:
    logits = sampler.processed(logits, rows)
    tokens = sampler.choose(logits, rows)
    keep = [k for k, row in enumerate(rows) if row.machine.tried is not None]
    if keep:
        machines = [rows[k].machine for k in keep]
        temperatures = [machine.law_temperature for machine in machines]
        part = logits if len(keep) == len(rows) else logits[keep]
        tries = [machine.tried for machine in machines]
        sampler.weigh(part, tries, temperatures, [tokens[k] for k in keep])
    return tokens


class Engine:
    """Runs jobs on a backend: all of a list (`run`), or whatever is admitted while others decode (`admit`, `step`).

    Args:
        load: numbers of prompts -> the prefill of exactly these, in this order; for `run`.
        answers: jobs for each prompt; job i * answers + k is the k-th of prompt i. On a backend that keeps keys they share
            one prefill, images included.
        load_size: most prompts that are loaded in one pass; None: all that there is room for.
    """

    def __init__(
        self,
        backend,
        grammar: Grammar,
        load: Callable[[Sequence[int]], Prefill] | None = None,
        *,
        batch_size: int = 1,
        parallel_attempts: int = 1,
        answers: int = 1,
        load_size: int | None = None,
    ):
        self.backend, self.grammar, self.load = backend, grammar, load
        self.answers, self.load_size = answers, load_size
        # without kept keys there is nothing that copies could start from
        self.batch_size = batch_size if backend.keeps_keys else 1
        self.parallel_attempts = parallel_attempts if backend.keeps_keys else 1
        self.copies = answers if backend.keeps_keys else 1
        self.rows: list[Row] = []
        self.logits: torch.Tensor | None = None

    @torch.inference_mode()
    def run(self, jobs: list[Job], groups: Sequence[Sequence[int]]) -> None:
        """Decode all jobs; results are in their machines and counts.

        Args:
            groups: numbers of prompts in the order in which they are taken; one group after the other.
        """
        loads = self.answers // self.copies  # of each prompt
        for group in groups:
            self._run_group(jobs, [prompt * loads + k for prompt in group for k in range(loads)])

    def _run_group(self, jobs: list[Job], order: list[int]) -> None:
        queue = order[::-1]
        size = max(1, self.batch_size // self.copies)
        while queue or self.rows:
            live = sum(not row.speculative for row in self.rows)
            free = size if not live else (self.batch_size - live) // self.copies
            # refill a quarter of the batch at a time: one prefill per finished row would be mostly overhead
            if queue and (not self.rows or free >= min(len(queue), max(1, size // 4))):
                places = [queue.pop() for _ in range(min(free, len(queue)))]
                step = self.load_size or len(places)
                for first in range(0, len(places), step):
                    part = places[first : first + step]
                    start = self.load([place * self.copies // self.answers for place in part])
                    self.admit([jobs[i * self.copies : (i + 1) * self.copies] for i in part], start)
            self.step()

    def step(self) -> None:
        """One token for every row, then one forward pass for those that are left."""
        self._sample()
        if self.rows:
            self._forward()

    def admit(self, owners: Sequence[Sequence[Job]], start: Prefill) -> None:
        """New rows: the first copies of the prompts, then the further ones of each.

        Args:
            owners: the jobs of each prompt of `start`, `copies` of them.
        """
        self.backend.add(start)
        first = len(self.rows)
        for copies, prompt, forwarded in zip(owners, start.prompts, start.forwarded, strict=True):
            counts = copies[0].counts
            counts.tokens_forwarded += forwarded
            counts.forwards += 1
            counts.image_encodes += copies[0].images
            self._add_row(copies[0], prompt)
        logits = start.logits
        if self.copies > 1:
            self.backend.reserve(first + len(owners) * self.copies)
            for number, (copies, prompt) in enumerate(zip(owners, start.prompts, strict=True)):
                for job in copies[1:]:
                    self.backend.fork(first + number)
                    self._add_row(job, prompt)
            logits = torch.cat([logits, logits.repeat_interleave(self.copies - 1, 0)])
        self.logits = logits if self.logits is None else torch.cat([self.logits, logits])

    def _add_row(self, job: Job, prompt: list[int]) -> None:
        job.counts.prompt_tokens = len(prompt)
        self.rows.append(Row(job, prompt, row_rng(job.machine.config.seed, job.id)))

    def _sample(self) -> None:
        """The next token of every row that is ready."""
        rows = self.rows
        # speculative attempts first: when an owner's attempt fails, the others have taken this step already
        ready = sorted((i for i, row in enumerate(rows) if row.ready), key=lambda i: not rows[i].speculative)
        all_rows = ready == list(range(len(rows)))
        logits = self.logits if all_rows else self.logits[ready]
        ready_rows = rows if all_rows else [rows[i] for i in ready]
        tokens = draw(logits, ready_rows)
        probabilities: list[float | None] = [None] * len(ready)
        if any(rows[i].machine.every_probability for i in ready):
            # one pass over the vocabulary for all rows: a row at a time, each would wait for the device
            probabilities = ready_rows[0].job.sampler.probabilities(logits, tokens)
        for i, token, probability in zip(ready, tokens, probabilities, strict=True):
            row, row_logits = rows[i], self.logits[i]
            if len(row.machine.ids) == row.machine.checkpoint:
                if row.saved_at != row.machine.checkpoint:
                    row.saved, row.saved_at = row_logits.clone(), row.machine.checkpoint
                self._speculate(i, row)
            if self._advance(i, row, token, row_logits, probability) == FINISH:
                row.finished = True
        for i in range(len(rows) - 1, -1, -1):
            if rows[i].finished:
                self._drop(i)

    def _advance(
        self, i: int, row: Row, token: int, logits: torch.Tensor, probability: float | None = None
    ) -> Action:
        """Give the machine its token; where it rewinds to saved logits, sample from them and go on.

        Args:
            logits: what the token was drawn from, `(vocabulary,)`; probability: its, where that is known.
        """
        machine = row.machine
        while True:
            if token in self.grammar.closes:
                probability = row.job.sampler.p_unconfident(logits, row, self.grammar.unconfident)
            elif not machine.every_probability:
                probability = None
            elif probability is None:
                probability = row.job.sampler.probabilities(logits.unsqueeze(0), [token])[0]
            action = machine.observe(token, probability)
            if isinstance(action, Feed):
                row.pending, row.ready = list(action.tokens), False
                return CONTINUE
            if row.speculative:
                # a finished one waits for its owner
                row.pending, row.ready = [token] if action == CONTINUE else [], False
                return CONTINUE
            while row.attempts and isinstance(action, Rewind):
                if action.rewrite or not machine.group_failures or action.length != row.saved_at:
                    break  # another group: another question, temperature or place
                events = row.attempts[0].machine.events
                if machine.tried is not None and machine.tried.seen(token for token, _ in events):
                    # equal to an earlier attempt. A draw that is taken again until it is new has the law of what is untried
                    row.attempts.pop(0).finished = True
                    continue
                action = self._take_over(i, row)
            if isinstance(action, Rewind) or action == FINISH or not machine.correcting:
                for attempt in row.attempts:
                    attempt.finished = True
                row.attempts = []
            if not isinstance(action, Rewind):
                if action == CONTINUE and row.ready:
                    row.pending, row.ready = [machine.ids[-1]], False
                return action
            if action.rewrite:
                self._rewrite(i, row)
                return CONTINUE
            if row.saved_at != action.length:
                self._refeed(i, row, action.length)
                return CONTINUE
            self.backend.rewind(i, row.base + action.length)
            self._speculate(i, row)
            logits, probability = row.saved, None
            token = self._choose(row, logits)

    def _choose(self, row: Row, logits: torch.Tensor) -> int:
        """One row's next token; `logits` is `(vocabulary,)`."""
        return draw(logits.unsqueeze(0), [row])[0]

    def _speculate(self, i: int, row: Row) -> None:
        """Start the other attempts of a group beside the row's own."""
        machine = row.machine
        if self.parallel_attempts == 1 or row.attempts or not machine.correcting:
            return
        for number in range(1, self.parallel_attempts - machine.group_failures):
            place = self.backend.fork(i)
            rng = row_rng(machine.config.seed, f"{row.job.id}\x1f{row.rng.random()}\x1f{number}")
            attempt = Row(row.job, row.prompt, rng)
            attempt.machine = SpeculativeAttempt(machine)
            attempt.base, attempt.insertion = row.base, row.insertion
            self.rows.append(attempt)
            row.attempts.append(attempt)
            self.logits = torch.cat([self.logits, row.saved.unsqueeze(0)])
            token = self._choose(attempt, row.saved)
            self._advance(place, attempt, token, row.saved)

    def _take_over(self, i: int, row: Row) -> Action:
        """Continue the row with its next speculative attempt; returns the machine's last action."""
        attempt = row.attempts.pop(0)
        attempt.finished = True
        shared = row.base + row.machine.checkpoint
        for token, probability in attempt.machine.events:
            action = row.machine.observe(token, probability)
            if action != CONTINUE:
                return action
        self.backend.adopt(self.rows.index(attempt), i, shared)
        return CONTINUE

    def _refeed(self, i: int, row: Row, length: int) -> None:
        """Go back to a length whose logits were not saved: its last token is fed once more."""
        self.backend.rewind(i, row.base + length - 1)
        if length:
            row.pending = [row.machine.ids[length - 1]]
        else:
            row.pending, row.prompt_part = [row.prompt[-1]], 1
        row.ready = False

    def _rewrite(self, i: int, row: Row) -> None:
        """The question changed: everything from its end on is computed again."""
        job, text = row.job, row.machine.insertion
        row.insertion = job.encode_insertion(text) if text else []
        row.prompt_part = len(row.insertion) + len(job.header)
        row.base = row.cut + row.prompt_part
        self.backend.rewind(i, row.cut)
        row.pending = row.insertion + job.header + row.machine.ids
        row.saved_at, row.ready = -1, False

    def _forward(self) -> None:
        """Feed what is pending: single tokens in one pass; chunks in another, when it is worth one."""
        rows = self.rows
        tokens: list[int | None] = [None] * len(rows)
        chunks = []
        for i, row in enumerate(rows):
            if len(row.pending) == 1 and not row.prompt_part:
                tokens[i] = row.pending[0]
            elif row.pending:
                chunks.append(i)
                row.waited += 1
        singles = [i for i, token in enumerate(tokens) if token is not None]
        if singles:
            # more chunks than single tokens, or one that has waited long enough
            if len(chunks) < len(singles) and all(rows[i].waited <= CHUNK_PATIENCE for i in chunks):
                chunks = []
            logits = self.backend.decode(tokens)
            if len(singles) < len(rows):
                waiting = [i for i, token in enumerate(tokens) if token is None]
                logits[waiting] = self.logits[waiting]
            self.logits = logits
        if chunks:
            self.logits[chunks] = self.backend.extend(
                [Chunk(i, rows[i].pending, rows[i].prompt_part) for i in chunks]
            )
        for row in (rows[i] for i in singles + chunks):
            row.job.counts.tokens_forwarded += len(row.pending)
            row.job.counts.forwards += 1
            row.pending, row.prompt_part, row.ready, row.waited = [], 0, True, 0

    def remove(self, job: Job) -> None:
        """Give up a job that is not finished, with its speculative attempts."""
        for i in range(len(self.rows) - 1, -1, -1):
            if self.rows[i].job is job:
                self._drop(i)

    def _drop(self, i: int) -> None:
        self.backend.remove(i)
        last = len(self.rows) - 1
        if i != last:
            self.rows[i], self.logits[i] = self.rows[last], self.logits[last]
        self.rows.pop()
        self.logits = self.logits[:last]
