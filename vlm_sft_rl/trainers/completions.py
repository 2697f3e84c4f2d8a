"""Batches of prompts with given answers, and the log-probabilities of the answers' tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..models.images import EncodedImage, is_pixels, with_images


@dataclass
class Completions:
    """Prompts padded on the left, answers padded on the right, so that the answers stand in one block.

    Attributes:
        features: the processor's tensors with the answers appended, ready for the model.
        tokens: (batch, width) the answers' ids; mask: (batch, width) float, 1 on real tokens.
        images: the rows' pictures where they were encoded before; `features` then hold no pixels.
    """

    features: dict[str, Any]
    tokens: torch.Tensor
    mask: torch.Tensor
    images: Sequence[EncodedImage] | None = None


def complete(
    processor, opening: list[int], texts: list[str], pictures: list, answers: list[list[int]], device, dtype
) -> Completions:
    """Build `Completions` from rendered prompts with one picture each and the ids of their answers.

    Args:
        opening: ids that follow every rendered prompt and are given, not learnt (a forced opening).
        texts: rendered prompts.
        answers: per row a list of ids, not empty.
    """
    tokenizer = processor.tokenizer
    special = not (tokenizer.bos_token and texts[0].startswith(tokenizer.bos_token))
    features = dict(
        processor(
            text=texts,
            images=[[picture] for picture in pictures],
            padding=True,
            padding_side="left",
            return_tensors="pt",
            add_special_tokens=special,
        ).to(device, dtype=dtype)
    )
    shape = features["input_ids"].shape
    skip, width = len(opening), max(map(len, answers))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    block = torch.full((len(answers), skip + width), pad, dtype=torch.long)
    real = torch.zeros(len(answers), skip + width, dtype=torch.long)
    for i, answer in enumerate(answers):
        row = [*opening, *answer]
        block[i, : len(row)], real[i, : len(row)] = torch.tensor(row), 1
    block, real = block.to(device), real.to(device)
    for name, value in features.items():
        if torch.is_tensor(value) and value.shape == shape:
            added = {"input_ids": block, "attention_mask": real}.get(name)
            # token types: text is 0 in every family
            added = torch.zeros_like(block) if added is None else added
            features[name] = torch.cat([value, added.to(value.dtype)], 1)
    return Completions(features, block[:, skip:], real[:, skip:].float())


@dataclass(frozen=True)
class ImagePrefix:
    """A prompt up to the end of its image, prepared and encoded once for every question about that image.

    Attributes:
        tokens: of the processor's tensors those with one entry a token, (length,) each and without padding.
        others: the rest, one row each (the image's grid, its size), pixels excepted.
    """

    tokens: dict[str, torch.Tensor]
    others: dict[str, torch.Tensor]
    image: EncodedImage


def image_prefixes(
    inputs: dict[str, torch.Tensor], tails: Sequence[list[int]], images: Sequence[EncodedImage]
) -> list[ImagePrefix]:
    """Take the rows of a processor's `inputs` apart; `tails` are the ids behind each row's image."""
    shape, rest = inputs["input_ids"].shape, {n: v for n, v in inputs.items() if not is_pixels(n)}
    prefixes = []
    for i, (tail, image) in enumerate(zip(tails, images, strict=True)):
        kept = inputs["attention_mask"][i].nonzero().squeeze(1)
        kept = kept[: len(kept) - len(tail)]
        prefixes.append(
            ImagePrefix(
                {name: value[i, kept] for name, value in rest.items() if value.shape == shape},
                {name: value[i : i + 1] for name, value in rest.items() if value.shape != shape},
                image,
            )
        )
    return prefixes


def complete_prefixes(
    prefixes: Sequence[ImagePrefix], tails: Sequence[list[int]], answers: Sequence[list[int]], pad: int | None
) -> Completions:
    """`complete` for images that were opened before: no picture is prepared or encoded again.

    Args:
        tails: per row the ids between image and answer, a forced opening included.
        answers: per row a list of ids, not empty.
        pad: the tokenizer's padding id.
    """
    device = prefixes[0].tokens["input_ids"].device
    lengths = [len(p.tokens["input_ids"]) + len(tail) for p, tail in zip(prefixes, tails, strict=True)]
    longest, width = max(lengths), max(map(len, answers))
    features = {}
    for name, first in prefixes[0].tokens.items():
        fill = (pad or 0) if name == "input_ids" else 0
        block = first.new_full((len(prefixes), longest + width), fill)
        for row, prefix, tail, answer, length in zip(block, prefixes, tails, answers, lengths, strict=True):
            own, new = prefix.tokens[name], [*tail, *answer]
            row[longest - length : longest - len(tail)] = own
            if name in ("input_ids", "attention_mask"):
                # token types: text is 0 in every family
                new = new if name == "input_ids" else [1] * len(new)
                row[longest - len(tail) : longest + len(answer)] = own.new_tensor(new)
        features[name] = block
    for name in prefixes[0].others:
        features[name] = torch.cat([prefix.others[name] for prefix in prefixes])
    mask = torch.zeros(len(answers), width, device=device)
    for row, answer in zip(mask, answers, strict=True):
        row[: len(answer)] = 1
    tokens = features["input_ids"][:, longest:]
    return Completions(features, tokens, mask, [prefix.image for prefix in prefixes])


def answer_log_probs(
    model,
    batch: Completions,
    unsaid: Sequence[int] = (),
    later: tuple[Sequence[int], int] = ((), 0),
    temperature: float = 1.0,
) -> torch.Tensor:
    """(batch, width) log-probabilities of the answers' tokens, float32 log-softmax over what may be said.

    Attention masks are the true ones: padding on the left is not attended to. 0 on padding.

    Args:
        unsaid: ids that are never sampled.
        later: ids that are not sampled among the first so many tokens. Both are left out of the softmax as sampling leaves
            them out: a policy could else give its probability to tokens that it never has to answer for.
        temperature: at which the answers were sampled.
    """
    width = batch.tokens.shape[1]
    # here and not once for all passes: a projector that is trained has other weights in each
    features = batch.features if batch.images is None else with_images(model, batch.features, batch.images)
    logits = model(**features, logits_to_keep=width + 1, use_cache=False).logits
    logits = logits[:, -width - 1 : -1].float()
    if temperature != 1:
        logits = logits / temperature
    if unsaid or later[1]:
        barred = torch.zeros(width, logits.shape[-1], dtype=torch.bool, device=logits.device)
        barred[:, list(unsaid)] = True
        barred[: later[1], list(later[0])] = True
        logits = logits.masked_fill(barred, float("-inf"))
    chosen = logits.gather(-1, batch.tokens.unsqueeze(-1)).squeeze(-1)
    return (chosen - logits.logsumexp(-1)).where(batch.mask > 0, 0.0) * batch.mask
