"""OPERA (arXiv 2311.17911): beam search that distrusts tokens everything else attends to.

A response token that many later ones attend to (an anchor) tends to be followed by what the picture does not show. Where
the attention to one column grows, candidates pay a penalty (section 3.2); where the anchor stays at one place for long,
the search goes back to it and takes another candidate (section 3.3).
"""

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch

from ..errors import UserError
from ..models.parts import unwrap
from .answers import Answer, Counts, build_grammar
from .cache import Chunk, RewindBackend
from .capabilities import rewind_obstacle
from .config import OperaConfig, SamplingConfig
from .contrastive import language_layers
from .engine import Job
from .generate import PromptBatch, sampling_options
from .machines import PlainDecoding
from .sampling import Sampler, not_finite, place_of

LEAST_WEIGHT = 1e-30  # its logarithm is taken
LARGEST_EXPONENT = 700.0  # exp of more is no float
OTHERS = "Use another decoder, for example vcd."


@dataclass(frozen=True)
class Beam:
    """A beginning of the answer.

    Attributes:
        ids: its tokens. score: sum of log-probabilities among the candidates, penalties included.
        columns: per response token the logarithm of the product of all scaled attention weights on it.
        anchors: per step the token whose product was largest.
        row: where the keys are.
    """

    ids: tuple[int, ...] = ()
    score: float = 0.0
    columns: tuple[float, ...] = ()
    anchors: tuple[int, ...] = ()
    row: int = 0


def expand(
    beam: Beam,
    tokens: Sequence[int],
    logits: Sequence[float],
    weights: Sequence[Sequence[float]],
    config: OperaConfig,
) -> list[Beam]:
    """The beam with each of its candidates.

    Args:
        weights: of each candidate its attention to every response token, itself last.
    """
    grown, scores = [], []
    for logit, attention in zip(logits, weights, strict=True):
        logs = [math.log(config.scale * max(weight, LEAST_WEIGHT)) for weight in attention]
        columns = (*(column + log for column, log in zip(beam.columns, logs, strict=False)), logs[-1])
        # the anchor is the column with the largest product among the last `window` (section 3.2)
        first = max(0, len(columns) - config.window)
        anchor = max(range(first, len(columns)), key=columns.__getitem__)
        penalty = config.alpha * config.factor * math.exp(min(columns[anchor], LARGEST_EXPONENT))
        grown.append((columns, (*beam.anchors, anchor)))
        scores.append(logit - penalty)
    top = max(scores)
    total = top + math.log(math.fsum(math.exp(score - top) for score in scores))
    return [
        Beam((*beam.ids, token), beam.score + score - total, columns, anchors)
        for token, score, (columns, anchors) in zip(tokens, scores, grown, strict=True)
    ]


def agreed_anchor(beams: Sequence[Beam], config: OperaConfig) -> int | None:
    """The anchor at which every beam has looked often enough to go back there, or None."""
    counts = [Counter(beam.anchors[-config.window :]) for beam in beams]
    # where beams differ, the place that most of them look at most (released code)
    modes = Counter(count.most_common(1)[0][0] for count in counts)
    place = modes.most_common(1)[0][0]
    often = all(count[place] >= config.overlap for count in counts)
    return place if often and place >= config.earliest else None


@dataclass
class OperaSearch:
    """The search itself: it is given the candidates of every step, and says which beams live on.

    Attributes:
        history: per length of the answer, all candidates that were to choose from.
        rejected: per length, the choices that a return has ruled out.
        finished: (score by length, ids) of answers that ended.
        returns: places that the search went back to.
    """

    config: OperaConfig
    ends: frozenset[int]
    history: list[list[Beam]] = field(default_factory=list)
    rejected: dict[int, set[tuple[int, ...]]] = field(default_factory=dict)
    finished: list[tuple[float, tuple[int, ...]]] = field(default_factory=list)
    returns: list[int] = field(default_factory=list)

    def choose(self, candidates: Sequence[Beam]) -> tuple[list[Beam], bool]:
        """The beams that live on, best first, and whether their keys must be computed again: the search went back."""
        self.history.append(list(candidates))
        beams = self._take(len(self.history))
        place = agreed_anchor(beams, self.config) if beams else None
        length = None if place is None else self._length_to_choose_anew(place, beams)
        if length is None:
            return beams, False
        self.rejected.setdefault(length, set()).update(beam.ids[:length] for beam in beams)
        self.rejected = {at: ids for at, ids in self.rejected.items() if at <= length}
        del self.history[length:]
        # those of this length are found again
        self.finished = [answer for answer in self.finished if len(answer[1]) < length]
        self.returns.append(length - 1)
        return self._take(length), True

    def _length_to_choose_anew(self, place: int, beams: Sequence[Beam]) -> int | None:
        """Length of the answers whose last token is chosen once more, or None where nothing is left to choose."""
        if self.returns and place < max(self.returns) - 1:
            return None  # places never move to the front (section 3.3)
        # the token behind the anchor; where that was tried enough, the anchor itself
        for at in (place + 1, place):
            if at >= len(self.history):
                continue
            length = at + 1
            untried = {beam.ids for beam in self.history[at] if beam.ids[-1] not in self.ends}
            untried -= self.rejected.get(length, set()) | {beam.ids[:length] for beam in beams}
            if self.returns.count(at) < self.config.rollbacks and untried:
                return length
        return None

    def _take(self, length: int) -> list[Beam]:
        rejected = self.rejected.get(length, set())
        ranked = sorted(self.history[length - 1], key=lambda beam: -beam.score)
        live: list[Beam] = []
        for rank, beam in enumerate(beam for beam in ranked if beam.ids not in rejected):
            if beam.ids[-1] not in self.ends:
                live.append(beam)
            elif rank < self.config.beams:
                self.finished.append((beam.score / length, beam.ids))
            if len(live) == self.config.beams:
                break
        return live

    def done(self, beams: Sequence[Beam]) -> bool:
        """No beam is left, the length limit is reached, or no beam can become better than enough finished answers."""
        if not beams or len(beams[0].ids) >= self.config.max_new_tokens:
            return True
        best = sorted((score for score, _ in self.finished), reverse=True)[: self.config.beams]
        return len(best) == self.config.beams and best[-1] >= beams[0].score / len(beams[0].ids)

    def best(self, beams: Sequence[Beam]) -> tuple[int, ...]:
        """The best answer by score over length, unfinished ones included where the limit cut them."""
        return max([*self.finished, *((b.score / len(b.ids), b.ids) for b in beams)])[1]


def generate_opera(
    model,
    processor,
    images: list,
    prompts: list[str],
    config: OperaConfig | None = None,
    *,
    ids: list[str] | None = None,
    batch_size: int = 1,
) -> list[Answer]:
    """Answer `prompts` about `images` by OPERA, one prompt at a time whatever `batch_size` is. Nothing is drawn.

    Attention weights are the largest over the heads of the last layer, as shares of all that a token attends to; they are
    read from eager attention, which is switched on meanwhile. The penalty on image attention that the released code puts
    on the first ten tokens is not in the paper, and not here.

    Returns:
        answers with an event `{"kind": "opera", "returns"}`: where the search went back to, in order.

    Raises UserError: as `generate_plain`, or a model without eager attention or a cache that can be rewound.
    """
    config = config or OperaConfig()
    batch = PromptBatch(model, processor, images, prompts, ids)
    inner = unwrap(model)
    name, original = type(inner).__name__, inner.config._attn_implementation
    attention: list[torch.Tensor] = []  # the last layer's, (rows, heads, queries, keys)

    def keep(module, args, output):
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if weights is None:
            raise UserError(f"OPERA: {name} gives no attention weights even with eager attention. {OTHERS}")
        attention[:] = [weights]

    with ExitStack() as stack, torch.inference_mode():
        try:
            inner.set_attn_implementation("eager")
        except (ValueError, ImportError) as error:
            raise UserError(
                f"OPERA reads attention weights, and {name} has no eager attention ({error}). {OTHERS}"
            ) from error
        stack.callback(inner.set_attn_implementation, original)
        stack.callback(language_layers(inner, "OPERA")[-1].self_attn.register_forward_hook(keep).remove)
        if (reason := rewind_obstacle(model)) is not None:
            raise UserError(f"OPERA: {name} cannot go back: {reason}. {OTHERS}")
        return [_answer(batch, i, config, attention) for i in range(len(prompts))]


def _answer(batch: PromptBatch, index: int, config: OperaConfig, attention: list[torch.Tensor]) -> Answer:
    model, processor = batch.model, batch.processor
    grammar = build_grammar(unwrap(model), processor, required=False)
    greedy = SamplingConfig(max_new_tokens=config.max_new_tokens)
    sampler = Sampler(**sampling_options(model, processor, greedy, grammar))
    backend = RewindBackend(model)
    start = batch.load([index], keeps_keys=True)
    backend.add(start)
    prompt = len(start.prompts[0])
    counts = Counts(prompt, 0, 1, batch.image_counts[index], prompt)
    search, beams, logits = OperaSearch(config, grammar.ends), [Beam()], start.logits
    rows, count = [0], config.candidates
    while True:
        # each beam takes `count` rows, one for each of its likeliest tokens
        top = sampler.masked(logits).topk(count)
        if not top.values[:, 0].isfinite().all():  # NaN counts as the largest
            raise not_finite(place_of(batch.names[index], len(beams[0].ids)))
        tokens, values = top.indices.flatten().tolist(), top.values.tolist()
        backend.select([row for row in rows for _ in range(count)])
        logits = backend.decode(tokens)
        counts.forwards += 1
        counts.tokens_forwarded += len(tokens)
        # shares of everything that is attended to, the prompt included; then the response's part of it
        weights = attention[0][:, :, -1].float().amax(1)
        weights = (weights / weights.sum(-1, keepdim=True))[:, prompt:].double().tolist()
        candidates = []
        for place, beam in enumerate(beams):
            part = slice(place * count, (place + 1) * count)
            grown = expand(beam, tokens[part], values[place], weights[part], config)
            candidates += [replace(candidate, row=part.start + i) for i, candidate in enumerate(grown)]
        beams, went_back = search.choose(candidates)
        if search.done(beams):
            break
        rows = [beam.row for beam in beams]
        if not went_back:
            logits = logits[rows]
            continue
        # the keys of these beams are gone: they are computed again, in one pass behind the prompt
        backend.select([0] * len(beams))
        rows = list(range(len(beams)))
        for row in rows:
            backend.rewind(row, prompt)
        logits = backend.extend([Chunk(row, list(beams[row].ids)) for row in rows])
        counts.forwards += 1
        counts.tokens_forwarded += sum(len(beam.ids) for beam in beams)
    machine = PlainDecoding(greedy, grammar)
    for token in search.best(beams):
        machine.observe(token, 0.0)
    machine.records = []  # probabilities of a search over penalised beams say nothing about a phrase
    machine.note("opera", returns=search.returns)
    return Job(machine, batch.names[index], batch.texts[index], counts=counts).answer()
