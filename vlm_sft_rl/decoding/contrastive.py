"""Training-free baselines that contrast two distributions at every token: VCD and DoLa.

VCD (arXiv 2311.16922) contrasts the picture with a noised copy of it, DoLa (arXiv 2309.03883) the last layer with an
earlier one. One prompt at a time: they are here to be compared with, in the same engine-independent form `Answer`.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..data import chat as prompting
from ..errors import UserError
from ..models.parts import unwrap
from .answers import Answer, build_grammar
from .cache import prefill
from .config import DoLaConfig, SamplingConfig, VCDConfig
from .generate import encode_batch, to_pictures
from .retrospective import FINISH, PlainDecoding
from .sampling import Sampler, row_rng

NOISE_STEPS = 1000


@dataclass
class _Row:
    temperature: float
    rng: random.Random


def keep_plausible(contrasted: torch.Tensor, logits: torch.Tensor, beta: float) -> torch.Tensor:
    """-inf for tokens whose probability under `logits` is below `beta` times the largest; `(vocabulary,)`."""
    return contrasted.masked_fill(logits < logits.max() + torch.log(torch.tensor(beta)), float("-inf"))


def noised(pixels: torch.Tensor, step: int, generator: torch.Generator) -> torch.Tensor:
    """The forward diffusion of VCD's code: `step` of 1000, variances on a sigmoid from 1e-5 to 5e-3."""
    variances = torch.sigmoid(torch.linspace(-6, 6, NOISE_STEPS)) * (5e-3 - 1e-5) + 1e-5
    kept = torch.cumprod(1 - variances, 0)[step]
    noise = torch.randn(pixels.shape, generator=generator).to(pixels)
    return kept.sqrt().to(pixels) * pixels + (1 - kept).sqrt().to(pixels) * noise


def contrast_pictures(clean: torch.Tensor, noisy: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """VCD's logits, `(vocabulary,)`: (1 + alpha) clean - alpha noisy where the clean picture finds a token plausible."""
    return keep_plausible((1 + alpha) * clean - alpha * noisy, clean, beta)


def contrast_layers(last: torch.Tensor, earlier: torch.Tensor, beta: float) -> torch.Tensor:
    """DoLa's logits, `(vocabulary,)`.

    Args:
        last: logits of the last layer, `(vocabulary,)`.
        earlier: logits of the candidate layers, `(layers, vocabulary)`; the one whose distribution differs most from the
            last layer's, by Jensen-Shannon divergence, is contrasted with.
        beta: tokens below `beta` times the largest probability of the last layer are ruled out.
    """
    final, early = last.log_softmax(-1), earlier.log_softmax(-1)
    middle = torch.logaddexp(final, early) - torch.log(torch.tensor(2.0))
    divergence = (early.exp() * (early - middle)).sum(-1) + (final.exp() * (final - middle)).sum(-1)
    chosen = early[int(divergence.argmax())]
    return keep_plausible(final - chosen, final, beta)


def generate_vcd(
    model,
    processor,
    images: list,
    prompts: list[str],
    config: VCDConfig | None = None,
    *,
    ids: list[str] | None = None,
    batch_size: int = 1,
) -> list[Answer]:
    """Visual contrastive decoding, one prompt at a time whatever `batch_size` is.

    The two branches are two rows of one batch, so every family whose processor gives `pixel_values` works. The noise
    of a row depends on (seed, id) alone. Prompts without a picture are decoded plainly.

    Raises:
        UserError: lists of different lengths.
    """
    config = config or VCDConfig()

    def branch(text: str, pictures: list, name: str) -> tuple[dict[str, Any], Callable]:
        if not pictures:
            return encode_batch(model, processor, [text], [[]]), lambda logits: logits[0]
        inputs = encode_batch(model, processor, [text, text], [pictures, pictures])
        generator = torch.Generator().manual_seed(row_rng(config.seed, name).getrandbits(63))
        half = len(inputs["pixel_values"]) // 2
        copy = noised(inputs["pixel_values"][half:].float(), config.noise_step, generator)
        inputs["pixel_values"] = torch.cat([inputs["pixel_values"][:half], copy.to(inputs["pixel_values"])])
        return inputs, lambda logits: contrast_pictures(logits[0], logits[1], config.alpha, config.beta)

    return _decode(model, processor, images, prompts, ids, branch, config)


def generate_dola(
    model,
    processor,
    images: list,
    prompts: list[str],
    config: DoLaConfig | None = None,
    *,
    ids: list[str] | None = None,
    batch_size: int = 1,
) -> list[Answer]:
    """Decoding by contrasting layers, as `generate(dola_layers=…)` did before transformers 5 moved it out; one prompt at a
    time whatever `batch_size` is.

    Raises:
        UserError: lists of different lengths, or layers that the model does not have.
    """
    config = config or DoLaConfig()
    inner = unwrap(model)
    blocks = language_layers(inner, "DoLa")
    tied = bool(getattr(inner.config.get_text_config(decoder=True), "tie_word_embeddings", False))
    candidates = candidate_layers(config.layers, len(blocks), tied)
    head = inner.get_output_embeddings()

    with _last_hidden(blocks, candidates) as hidden:

        def contrast(logits: torch.Tensor) -> torch.Tensor:
            earlier = torch.stack([head(hidden[layer]).float() for layer in candidates])
            return contrast_layers(logits[0], earlier, config.beta)

        def branch(text: str, pictures: list, name: str) -> tuple[dict[str, Any], Callable]:
            return encode_batch(model, processor, [text], [pictures]), contrast

        return _decode(model, processor, images, prompts, ids, branch, config)


def candidate_layers(layers: str | Sequence[int], count: int, tied: bool) -> list[int]:
    """Numbers of the layers that DoLa may contrast with; with tied embeddings the first two say nothing.

    Raises:
        UserError: a layer outside 0 to count - 1, or an unknown name.
    """
    start = 2 if tied and count > 2 else 0
    if layers == "low":
        return list(range(start, min(max(count // 2, start + 1), 20), 2))
    if layers == "high":
        return list(range(max(count // 2, count - 20), count, 2))
    if isinstance(layers, str) or not layers or not all(0 <= layer < count for layer in layers):
        raise UserError(f"DoLa: layers is {layers!r}; expected low, high, or numbers from 0 to {count - 1}.")
    return list(layers)


def language_layers(inner, method: str) -> torch.nn.ModuleList:
    """The language model's layers.

    Raises:
        UserError: they are not where they are looked for; the message begins with `method`.
    """
    decoder = inner.get_decoder()
    decoder = getattr(decoder, "language_model", decoder)
    if not isinstance(getattr(decoder, "layers", None), torch.nn.ModuleList):
        raise UserError(
            f"{method}: {type(inner).__name__} has no list of layers that is known here. Use another decoder."
        )
    return decoder.layers


@contextmanager
def _last_hidden(blocks: torch.nn.ModuleList, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Fills a map of layer number to the hidden state `(width,)` that enters it, at the last position of row 0."""
    found: dict[int, torch.Tensor] = {}

    def hook(number: int):
        def keep(module, args, kwargs):
            states = args[0] if args else kwargs["hidden_states"]
            found[number] = states[0, -1]

        return keep

    handles = [blocks[n].register_forward_pre_hook(hook(n), with_kwargs=True) for n in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def _decode(model, processor, images, prompts, ids, branch, config: SamplingConfig) -> list[Answer]:
    names = [str(i) for i in range(len(prompts))] if ids is None else [str(i) for i in ids]
    if not len(images) == len(prompts) == len(names):
        raise UserError(
            f"{len(images)} images, {len(prompts)} prompts, {len(names)} ids: the lists must be equally long."
        )
    grammar = build_grammar(unwrap(model), processor, required=False)
    suppress = prompting.suppressed_ids(unwrap(model), prompting.get_tokenizer(processor), grammar.ends)
    sampler = Sampler(top_k=config.top_k, top_p=config.top_p, suppress=suppress)
    answers = []
    for item, prompt, name in zip(images, prompts, names, strict=True):
        pictures = to_pictures(item)
        text = prompting.render(processor, prompt, len(pictures))
        inputs, contrast = branch(text, pictures, name)
        machine, row = PlainDecoding(config, grammar), _Row(config.temperature, row_rng(config.seed, name))
        start = prefill(model, inputs, own_cache=False)
        tokens, logits = inputs["input_ids"], start.logits
        forwards = 1
        while True:
            token = sampler.choose(contrast(logits).unsqueeze(0), [row])[0]
            p = (
                sampler.p_unconfident(logits[0], row, grammar.unconfident)
                if token in grammar.closes
                else None
            )
            if machine.observe(token, p) == FINISH:
                break
            tokens = torch.cat([tokens, tokens.new_full((len(tokens), 1), token)], 1)
            logits = start.step(model, tokens)
            forwards += 1
        answer = machine.answer()
        rows, width = len(tokens), len(start.prompts[0])
        answer.counts.prompt_tokens, answer.counts.forwards = width, forwards
        answer.counts.tokens_forwarded = rows * (width + forwards - 1)
        answer.counts.image_encodes = rows * len(pictures)
        answer.prompt, answer.id = prompt, name
        answers.append(answer)
    return answers
