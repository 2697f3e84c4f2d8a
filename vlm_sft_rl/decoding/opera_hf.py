"""`generate_opera`: OPERA on a transformers model whose attention weights can be read."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from ..errors import UserError
from ..models.unwrap import unwrap
from . import prompt as prompting
from .admission import layer_windows, rewind_obstacle
from .backends import Chunk, RewindBackend
from .contrastive import language_layers
from .hf import check_lists, encode_batch, to_pictures
from .opera import Beam, OperaConfig, OperaSearch, expand
from .prefill import prefill
from .records import Answer, Counts, RetrospectiveConfig
from .retrospective import Observer
from .sampling import Sampler


def generate_opera(
    model,
    processor,
    images: list,
    prompts: list[str],
    config: OperaConfig | None = None,
    *,
    max_new_tokens: int = 512,
    ids: list[str] | None = None,
) -> list[Answer]:
    """Answer `prompts` about `images` by OPERA, one prompt at a time. Nothing is drawn.

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
        return [
            _answer(model, processor, config, max_new_tokens, *each)
            for each in zip(images, prompts, names, strict=True)
        ]


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


def _answer(model, processor, config: OperaConfig, limit: int, item, prompt: str, name: str) -> Answer:
    inner, pictures = unwrap(model), to_pictures(item)
    grammar = prompting.build_grammar(inner, processor, required=False)
    sampler = Sampler(
        suppress=prompting.suppressed_ids(inner, prompting.tokenizer_of(processor), grammar.ends)
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
    machine = Observer(RetrospectiveConfig(max_new_tokens=limit), grammar)
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
