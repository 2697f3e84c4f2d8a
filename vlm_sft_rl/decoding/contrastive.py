"""Training-free baselines that contrast two distributions at every token: VCD and DoLa.

VCD (arXiv 2311.16922) contrasts the picture with a noised copy of it, DoLa (arXiv 2309.03883) the last layer with an
earlier one. One prompt at a time: they are here to be compared with.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from ..errors import UserError
from ..models.parts import unwrap
from .answers import Answer, Counts, build_grammar
from .cache import prefill
from .config import DoLaConfig, SamplingConfig, VCDConfig
from .engine import Job
from .generate import PromptBatch, encode_batch, sampling_options
from .machines import FINISH, PlainDecoding
from .sampling import Sampler, Sampling, not_finite, place_of, row_rng

NOISE_STEPS = 1000
# (rendered prompt, pictures, id) -> (inputs of the passes, their logits (rows, vocabulary) -> what to choose from)
Branches = Callable[[str, list, str], tuple[dict[str, Any], Callable[[torch.Tensor], torch.Tensor]]]


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

    Raises UserError: as `generate_plain`.
    """
    config = config or VCDConfig()

    def branches(text: str, pictures: list, name: str):
        if not pictures:
            return encode_batch(model, processor, [text], [[]]), lambda logits: logits[0]
        inputs = encode_batch(model, processor, [text, text], [pictures, pictures])
        generator = torch.Generator().manual_seed(row_rng(config.seed, name).getrandbits(63))
        clean, copy = inputs["pixel_values"].chunk(2)
        noisy = noised(copy.float(), config.noise_step, generator)
        inputs["pixel_values"] = torch.cat([clean, noisy.to(clean)])
        return inputs, lambda logits: contrast_pictures(logits[0], logits[1], config.alpha, config.beta)

    return _decode(PromptBatch(model, processor, images, prompts, ids), branches, config)


def noised(pixels: torch.Tensor, step: int, generator: torch.Generator) -> torch.Tensor:
    """The forward diffusion of VCD's code: `step` of 1000, variances on a sigmoid from 1e-5 to 5e-3."""
    variances = torch.sigmoid(torch.linspace(-6, 6, NOISE_STEPS)) * (5e-3 - 1e-5) + 1e-5
    kept = torch.cumprod(1 - variances, 0)[step]
    noise = torch.randn(pixels.shape, generator=generator).to(pixels)
    return kept.sqrt().to(pixels) * pixels + (1 - kept).sqrt().to(pixels) * noise


def contrast_pictures(clean: torch.Tensor, noisy: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """VCD's logits, `(vocabulary,)`: (1 + alpha) clean - alpha noisy where the clean picture makes a token plausible."""
    return keep_plausible((1 + alpha) * clean - alpha * noisy, clean, beta)


def keep_plausible(contrast: torch.Tensor, logits: torch.Tensor, beta: float) -> torch.Tensor:
    """-inf for tokens whose probability under `logits` is below `beta` times the largest; `(vocabulary,)`."""
    return contrast.masked_fill(logits < logits.max() + torch.log(torch.tensor(beta)), float("-inf"))


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

    Raises UserError: as `generate_plain`, or layers that the model does not have.
    """
    config = config or DoLaConfig()
    inner = unwrap(model)
    layers = language_layers(inner, "DoLa")
    tied = bool(getattr(inner.config.get_text_config(decoder=True), "tie_word_embeddings", False))
    numbers = candidate_layers(config.layers, len(layers), tied)
    head = inner.get_output_embeddings()
    states: dict[int, torch.Tensor] = {}  # of the last position, as they enter a layer

    def keep(number: int):
        def hook(module, args, kwargs):
            states[number] = (args[0] if args else kwargs["hidden_states"])[0, -1]

        return hook

    def contrast(logits: torch.Tensor) -> torch.Tensor:
        earlier = torch.stack([head(states[number]).float() for number in numbers])
        return contrast_layers(logits[0], earlier, config.beta)

    def branches(text: str, pictures: list, name: str):
        return encode_batch(model, processor, [text], [pictures]), contrast

    batch = PromptBatch(model, processor, images, prompts, ids)
    with ExitStack() as hooks:
        for number in numbers:
            handle = layers[number].register_forward_pre_hook(keep(number), with_kwargs=True)
            hooks.callback(handle.remove)
        return _decode(batch, branches, config)


def language_layers(inner, method: str) -> torch.nn.ModuleList:
    """The language model's layers.

    Raises UserError: they are not where they are looked for; the message begins with `method`.
    """
    decoder = inner.get_decoder()
    decoder = getattr(decoder, "language_model", decoder)
    if not isinstance(getattr(decoder, "layers", None), torch.nn.ModuleList):
        raise UserError(
            f"{method}: {type(inner).__name__} has no list of layers that is known here. Use another decoder."
        )
    return decoder.layers


def candidate_layers(layers: str | Sequence[int], count: int, tied: bool) -> list[int]:
    """Numbers of the layers that DoLa may contrast with; with tied embeddings the first two say nothing.

    Raises UserError: a layer outside 0 to count - 1, or an unknown name.
    """
    start = 2 if tied and count > 2 else 0
    if layers == "low":
        return list(range(start, min(max(count // 2, start + 1), 20), 2))
    if layers == "high":
        return list(range(max(count // 2, count - 20), count, 2))
    if isinstance(layers, str) or not layers or not all(0 <= layer < count for layer in layers):
        raise UserError(f"DoLa: layers is {layers!r}; expected low, high, or numbers from 0 to {count - 1}.")
    return list(layers)


def contrast_layers(last: torch.Tensor, earlier: torch.Tensor, beta: float) -> torch.Tensor:
    """DoLa's logits, `(vocabulary,)`.

    Args:
        last: logits of the last layer, `(vocabulary,)`.
        earlier: logits of the candidate layers, `(layers, vocabulary)`; the one whose distribution differs most from the
            last layer's, by Jensen-Shannon divergence, is contrasted with.
    """
    final, early = last.log_softmax(-1), earlier.log_softmax(-1)
    middle = torch.logaddexp(final, early) - torch.log(torch.tensor(2.0))
    divergence = (early.exp() * (early - middle)).sum(-1) + (final.exp() * (final - middle)).sum(-1)
    return keep_plausible(final - early[int(divergence.argmax())], final, beta)


@torch.inference_mode()
def _decode(prompts: PromptBatch, branches: Branches, config: SamplingConfig) -> list[Answer]:
    model = prompts.model
    grammar = build_grammar(unwrap(model), prompts.processor, required=False)
    sampler = Sampler(**sampling_options(model, prompts.processor, config, grammar))
    answers = []
    for i, name in enumerate(prompts.names):
        inputs, contrast = branches(prompts.rendered[i], prompts.pictures[i], name)
        machine, row = (
            PlainDecoding(config, grammar),
            Sampling(config.temperature, row_rng(config.seed, name)),
        )
        start = prefill(model, inputs, own_cache=False)
        tokens, logits = inputs["input_ids"], start.logits
        rows, width = tokens.shape[0], len(start.prompts[0])
        counts = Counts(rows * width, 0, 1, rows * len(prompts.pictures[i]), width)
        while True:
            row.place = place_of(name, len(machine.ids))
            if not logits.amax(-1).isfinite().all():  # NaN counts as the largest
                raise not_finite(row.place)
            token = sampler.choose(contrast(logits).unsqueeze(0), [row])[0]
            doubt = None
            if token in grammar.closes:
                doubt = sampler.p_unconfident(logits[0], row, grammar.unconfident)
            if machine.observe(token, doubt) == FINISH:
                break
            tokens = torch.cat([tokens, tokens.new_full((rows, 1), token)], 1)
            logits = start.step(model, tokens)
            counts.forwards += 1
            counts.tokens_forwarded += rows
        answers.append(Job(machine, name, prompts.texts[i], counts=counts).answer())
    return answers
