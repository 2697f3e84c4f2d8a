"""N answers to each prompt: prompt and images are computed once for all of them, and their keys held once."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import UserError
from ..models.unwrap import unwrap
from . import prompt as prompting
from .admission import choose_backend, rewindable_attention
from .backends import RecomputeBackend
from .engine import Engine, Job
from .grammar import Grammar
from .hf import check_lists, encode_batch, to_answer, to_pictures
from .prefill import prefill
from .records import Answer, RetrospectiveConfig
from .retrospective import CONTINUE, FINISH, Observer
from .sampling import Sampler
from .shared_prefix import worth_sharing

PASS = 2048  # tokens of prompts in one pass: enough for full speed; more costs memory, and on a CPU time
STOP_WINDOW = 24  # tokens decoded behind the last one to look for a stop string


class StoppingObserver(Observer):
    """Plain decoding that ends at the first of some strings; the answer ends before it. It also keeps the mean
    log-probability of its tokens."""

    every_probability = True

    def __init__(self, config: RetrospectiveConfig, grammar: Grammar, stop: Sequence[str]):
        super().__init__(config, grammar)
        self.stop = tuple(stop)
        self.log_probs: list[float] = []

    def observe(self, token: int, p_unconfident: float | None = None):
        action = super().observe(token, p_unconfident)
        if p_unconfident is not None and token not in self.grammar.closes:
            self.log_probs.append(math.log(max(p_unconfident, 1e-12)))
        if action == CONTINUE and self.stop:
            # a string is found when its last character comes: a window of the end is enough
            tail = self.grammar.decode(self.ids[-STOP_WINDOW:])
            if any(text in tail for text in self.stop):
                return FINISH
        return action

    def answer(self) -> Answer:
        answer = super().answer()
        mean = sum(self.log_probs) / max(1, len(self.log_probs))
        answer.trace.append({"kind": "drawn", "log_prob": mean})
        cut = min((at for s in self.stop if (at := answer.text.find(s)) >= 0), default=None)
        if cut is not None:
            answer.text = answer.accepted_text = answer.best_effort_text = answer.text[:cut].rstrip()
        return answer


def sample_many(
    model,
    processor,
    images: list,
    prompts: list[str],
    n: int,
    *,
    max_new_tokens: int = 384,
    temperature: float = 0.9,
    top_p: float | None = 0.95,
    top_k: int | None = 50,
    stop: Sequence[str] = (),
    seed: int = 0,
    ids: list[str] | None = None,
    batch_size: int = 24,
    prefixes: list[str] | None = None,
) -> list[list[Answer]]:
    """Draw `n` answers to each of `prompts` about `images`; the defaults are R3V's (arXiv 2411.00855, released code).

    Args:
        images: per prompt a PIL image, a list of PIL images, or None.
        temperature: 0 = greedy.
        stop: strings at which an answer ends; they are left out.
        ids: names of the prompts; answer k of prompt `a` is drawn from the stream (seed, "a#k") alone, so it depends
            neither on its batch nor on `n`.
        batch_size: answers decoded side by side.
        prefixes: how the answers to each prompt begin; they are continued and the beginning is not repeated.

    Returns:
        A list of `n` answers for each prompt. The first one's counts carry the prefill and the image encodes. Each trace
        ends with the event `{"kind": "drawn", "log_prob"}`, the mean log-probability of the answer's tokens.

    Raises:
        UserError: lists of different lengths, no chat template, an encoder-decoder model, a setting out of range.
    """
    config = RetrospectiveConfig(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    if n < 1:
        raise UserError(f"n = {n}: at least one answer to each prompt must be drawn.")
    names = check_lists(model, images, prompts, ids, batch_size)
    pictures = [to_pictures(item) for item in images]
    texts = [prompting.render(processor, p, len(own)) for p, own in zip(prompts, pictures, strict=True)]
    if prefixes is not None:
        lead = prompting.answer_lead(processor)
        texts = [text + (lead + begun if begun else "") for text, begun in zip(texts, prefixes, strict=True)]
    with rewindable_attention(model), torch.inference_mode():
        # rows of a batch should be about equally long, and processors do not mix rows with and without images
        size = [sum(p.width * p.height for p in own) + len(t) for own, t in zip(pictures, texts, strict=True)]
        groups = []
        for with_images in (True, False):
            chosen = [i for i in range(len(texts)) if bool(pictures[i]) == with_images]
            groups.append(sorted(chosen, key=lambda i: -size[i]))
        kept: dict[tuple[int, ...], dict[str, Any]] = {}

        def encode(indices: Sequence[int]) -> dict[str, Any]:
            found = kept.pop(tuple(indices), None)
            own = [texts[i] for i in indices], [pictures[i] for i in indices]
            return found if found is not None else encode_batch(model, processor, *own)

        def length(i: int) -> int:
            kept[(i,)] = encode([i])
            return kept[(i,)]["input_ids"].shape[1]

        copies, load_size = 1, None
        if n > 1 and texts:
            longest = max(length(group[0]) for group in groups if group)
            shortest = min(length(group[-1]) for group in groups if group)
            copies = n if worth_sharing(shortest, max_new_tokens) else 1
            load_size = max(1, PASS // longest)
        backend = choose_backend(model, copies)
        shared = not isinstance(backend, RecomputeBackend)

        def load(indices: Sequence[int]) -> tuple[Any, dict[str, Any]]:
            inputs = encode(indices)
            return prefill(model, inputs, own_cache=shared), inputs

        counts = [len(own) for own in pictures]
        return draw_loaded(
            model,
            processor,
            backend,
            load,
            groups,
            names,
            prompts,
            n,
            config,
            stop,
            batch_size,
            counts,
            load_size,
        )


def draw_loaded(
    model,
    processor,
    backend,
    load: Callable[[Sequence[int]], tuple[Any, Any]],
    groups: Sequence[Sequence[int]],
    names: Sequence[str],
    prompts: Sequence[str],
    n: int,
    config: RetrospectiveConfig,
    stop: Sequence[str],
    batch_size: int,
    images: Sequence[int],
    load_size: int | None = None,
) -> list[list[Answer]]:
    """`sample_many` of prompts that `load` prefills; to be called inside of `rewindable_attention`.

    Args:
        backend: of `choose_backend(model, copies)`, copies being 1 or n.
        load: numbers of prompts -> `(Prefill, inputs)` of exactly these, in this order.
        groups: the order in which prompts are taken; no prefill mixes two groups.
        images: per prompt how many of them `load` encodes.
        load_size: most prompts in one call of `load`.
    """
    shared = not isinstance(backend, RecomputeBackend)
    grammar = prompting.build_grammar(unwrap(model), processor, required=False)
    stop = tuple(text for text in stop if text)
    jobs = [
        Job(StoppingObserver(config, grammar, stop), f"{name}#{k}", images=count)
        for name, count in zip(names, images, strict=True)
        for k in range(n)
    ]
    suppress = prompting.suppressed_ids(unwrap(model), prompting.tokenizer_of(processor), grammar.ends)
    engine = Engine(
        backend,
        grammar,
        Sampler(top_k=config.top_k, top_p=config.top_p, suppress=suppress),
        load if shared else lambda indices: load([i // n for i in indices]),
        batch_size=batch_size if shared else 1,
        seed=config.seed,
        copies=n if shared else 1,
        load_size=load_size,
    )
    for group in groups:
        engine.run(jobs, group if shared else [i * n + k for i in group for k in range(n)])
    answers = [to_answer(job, prompts[i // n], config) for i, job in enumerate(jobs)]
    for answer in answers:
        answer.threshold = None
    return [answers[i * n : (i + 1) * n] for i in range(len(prompts))]
