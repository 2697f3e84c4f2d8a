"""OPERA (arXiv 2311.17911): beam search that distrusts tokens everything else attends to. No torch.

A response token that many later ones attend to (an anchor) tends to be followed by what the picture does not show. Where
the attention to one column grows, candidates pay a penalty (section 3.2); where the anchor stays at one place for long,
the search goes back to it and takes another candidate (section 3.3).
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from ..data import chat as prompting
from ..errors import UserError
from ..models.parts import unwrap
from .answers import Answer, Counts, build_grammar
from .cache import Chunk, RewindBackend, prefill
from .capabilities import layer_windows, rewind_obstacle
from .config import OperaConfig, SamplingConfig
from .contrastive import language_layers
from .generate import check_lists, encode_batch, to_pictures
from .retrospective import PlainDecoding
from .sampling import Sampler

LEAST_WEIGHT = 1e-30  # its logarithm is taken
LARGEST_EXPONENT = 700.0  # exp of more is no float


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


def lengthen(columns: Sequence[float], weights: Sequence[float], scale: float) -> tuple[float, ...]:
    """The columns after one more token.

    Args:
        weights: its attention to every response token, itself last: one more than there are columns.
    """
    logs = [math.log(scale * max(weight, LEAST_WEIGHT)) for weight in weights]
    return (*(column + new for column, new in zip(columns, logs, strict=False)), logs[-1])


def anchor(columns: Sequence[float], window: int) -> tuple[int, float]:
    """The column with the largest product among the last `window`, and the logarithm of that product."""
    first = max(0, len(columns) - window)
    place = max(range(first, len(columns)), key=columns.__getitem__)
    return place, columns[place]


def expand(
    beam: Beam,
    tokens: Sequence[int],
    logits: Sequence[float],
    weights: Sequence[Sequence[float]],
    config: OperaConfig,
) -> list[Beam]:
    """The beam with each of its candidates; `weights[i]` is candidate i's attention to the response, itself last."""
    grown, scores = [], []
    for logit, own in zip(logits, weights, strict=True):
        columns = lengthen(beam.columns, own, config.scale)
        place, product = anchor(columns, config.window)
        penalty = config.alpha * config.factor * math.exp(min(product, LARGEST_EXPONENT))
        grown.append((columns, place))
        scores.append(logit - penalty)
    top = max(scores)
    total = top + math.log(math.fsum(math.exp(score - top) for score in scores))
    return [
        Beam((*beam.ids, token), beam.score + score - total, columns, (*beam.anchors, place))
        for token, score, (columns, place) in zip(tokens, scores, grown, strict=True)
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
        finished: (score by length, ids) of answers that ended. returns: places that the search went back to.
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
        length = self._place_to_choose_anew(place, beams) if place is not None else None
        if length is None:
            return beams, False
        kept = {beam.ids[:length] for beam in beams}
        self.rejected.setdefault(length, set()).update(kept)
        for later in [at for at in self.rejected if at > length]:
            del self.rejected[later]
        del self.history[length:]
        # those of this length are found again
        self.finished = [answer for answer in self.finished if len(answer[1]) < length]
        self.returns.append(length - 1)
        return self._take(length), True

    def _place_to_choose_anew(self, place: int, beams: Sequence[Beam]) -> int | None:
        """Length of the answers whose last token is chosen once more, or None where nothing is left to choose."""
        if self.returns and place < max(self.returns) - 1:
            return None  # places never move to the front (section 3.3)
        for at in (
            place + 1,
            place,
        ):  # the token behind the anchor; where that was tried enough, the anchor itself
            length = at + 1
            if at >= len(self.history):
                continue
            open_ = {beam.ids for beam in self.history[at] if beam.ids[-1] not in self.ends}
            open_ -= self.rejected.get(length, set()) | {beam.ids[:length] for beam in beams}
            if self.returns.count(at) < self.config.rollbacks and open_:
                return length
        return None

    def _take(self, length: int) -> list[Beam]:
        ruled_out = self.rejected.get(length, set())
        ranked = sorted(self.history[length - 1], key=lambda beam: -beam.score)
        live: list[Beam] = []
        for rank, beam in enumerate(b for b in ranked if b.ids not in ruled_out):
            if beam.ids[-1] not in self.ends:
                live.append(beam)
            elif rank < self.config.beams:
                self.finished.append((beam.score / length, beam.ids))
            if len(live) == self.config.beams:
                break
        return live

    def done(self, beams: Sequence[Beam], limit: int) -> bool:
        """No beam is left, the length limit is reached, or no beam can become better than enough finished answers."""
        if not beams or len(beams[0].ids) >= limit:
            return True
        best = sorted((score for score, _ in self.finished), reverse=True)[: self.config.beams]
        return len(best) == self.config.beams and best[-1] >= beams[0].score / len(beams[0].ids)

    def best(self, beams: Sequence[Beam]) -> tuple[int, ...]:
        """The best answer by score over length, unfinished ones included where the limit cut them."""
        return max([*self.finished, *((b.score / len(b.ids), b.ids) for b in beams)])[1]


# `generate_opera`: OPERA on a transformers model whose attention weights can be read.
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

    Raises:
        UserError: lists of different lengths, or a model without eager attention or a cache that can be rewound.
    """
    config = config or OperaConfig()
    names = check_lists(model, images, prompts, ids, 1)
    with _eager(model), torch.inference_mode():
        if (reason := rewind_obstacle(model)) is not None:
            raise UserError(
                f"OPERA: {type(unwrap(model)).__name__} cannot go back: {reason}. Use another decoder."
            )
        return [_answer(model, processor, config, *each) for each in zip(images, prompts, names, strict=True)]


@contextmanager
def _eager(model) -> Iterator[None]:
    inner = unwrap(model)
    original = inner.config._attn_implementation
    try:
        inner.set_attn_implementation("eager")
    except (ValueError, ImportError) as error:
        raise UserError(
            f"OPERA reads attention weights, and {type(inner).__name__} has no eager attention ({error}). "
            "Use another decoder, for example vcd."
        ) from error
    try:
        yield
    finally:
        inner.set_attn_implementation(original)


@contextmanager
def _last_attention(inner) -> Iterator[list[torch.Tensor]]:
    """A list whose one element is the last layer's weights `(rows, heads, queries, keys)` of the last forward pass."""
    found: list[torch.Tensor] = []

    def keep(module, args, output):
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if weights is None:
            raise UserError(
                f"OPERA: {type(module).__name__} gives no attention weights even with eager attention. Use another "
                "decoder, for example vcd."
            )
        found[:] = [weights]

    handle = language_layers(inner, "OPERA")[-1].self_attn.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def _answer(model, processor, config: OperaConfig, item, prompt: str, name: str) -> Answer:
    limit = config.max_new_tokens
    inner, pictures = unwrap(model), to_pictures(item)
    grammar = build_grammar(inner, processor, required=False)
    sampler = Sampler(
        suppress=prompting.suppressed_ids(inner, prompting.get_tokenizer(processor), grammar.ends)
    )
    inputs = encode_batch(model, processor, [prompting.render(processor, prompt, len(pictures))], [pictures])
    start = prefill(model, inputs)
    backend = RewindBackend(model, layer_windows(model))
    backend.add(start, inputs)
    asked = len(start.prompts[0])
    counts = Counts(asked, 0, 1, len(pictures), asked)
    search, beams, logits = OperaSearch(config, grammar.ends), [Beam()], start.logits
    with _last_attention(inner) as attention:
        while True:
            top = sampler.masked(logits).topk(config.candidates)
            owners = list(range(len(beams)))
            for row in range(len(beams)):
                for _ in range(config.candidates - 1):
                    backend.fork(row)
                    owners.append(row)
            seen = [0] * len(beams)
            ranks = []
            for owner in owners:
                ranks.append(seen[owner])
                seen[owner] += 1
            tokens = [int(top.indices[owner, rank]) for owner, rank in zip(owners, ranks, strict=True)]
            logits = backend.decode(tokens)
            counts.forwards += 1
            counts.tokens_forwarded += len(tokens)
            # shares of everything that is attended to, the prompt included; then the response's part of it
            weights = attention[0][:, :, -1].float().amax(1)
            weights = (weights / weights.sum(-1, keepdim=True))[:, asked:].double().tolist()
            candidates = []
            for row, beam in enumerate(beams):
                own = [place for place, owner in enumerate(owners) if owner == row]
                grown = expand(
                    beam,
                    [tokens[place] for place in own],
                    [float(top.values[row, ranks[place]]) for place in own],
                    [weights[place] for place in own],
                    config,
                )
                candidates += [replace(one, row=place) for one, place in zip(grown, own, strict=True)]
            beams, went_back = search.choose(candidates)
            if search.done(beams, limit):
                break
            if went_back:
                beams, logits = _compute_again(backend, beams, asked)
                counts.forwards += 1
                counts.tokens_forwarded += sum(len(beam.ids) for beam in beams)
            else:
                beams, logits = _keep(backend, beams, logits)
    best = search.best(beams)
    machine = PlainDecoding(SamplingConfig(max_new_tokens=limit), grammar)
    for token in best:
        machine.observe(token, 0.0)
    answer = machine.answer()
    counts.tokens_kept = answer.counts.tokens_kept
    answer.spans, answer.counts, answer.prompt, answer.id, answer.threshold = [], counts, prompt, name, None
    answer.trace = [{"kind": "opera", "returns": search.returns}]
    return answer


def _keep(backend: RewindBackend, beams: list[Beam], logits: torch.Tensor) -> tuple[list[Beam], torch.Tensor]:
    """Only the rows of these beams, and the beams in the order of their rows."""
    by_row = {beam.row: beam for beam in beams}
    places = list(range(len(backend.lengths)))
    for row in range(len(places) - 1, -1, -1):
        if places[row] not in by_row:
            backend.remove(row)
            places[row] = places[-1]
            places.pop()
    return [by_row[place] for place in places], logits[places]


def _compute_again(backend: RewindBackend, beams: list[Beam], asked: int) -> tuple[list[Beam], torch.Tensor]:
    """Rows for beams whose keys are gone, in one pass behind the prompt."""
    while len(backend.lengths) > len(beams):
        backend.remove(len(backend.lengths) - 1)
    for row in range(len(backend.lengths)):
        backend.rewind(row, asked)
    while len(backend.lengths) < len(beams):
        backend.fork(0)
    chunks = [Chunk(row, list(beam.ids)) for row, beam in enumerate(beams)]
    return beams, backend.extend(chunks)
