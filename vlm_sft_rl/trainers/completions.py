"""Batches of prompts with given answers, and the log-probabilities of the answers' tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..models.images import EncodedImage, with_images


@dataclass
class Completions:
    """Prompts padded on the left, answers padded on the right, so that the answers stand in one block.

    Attributes:
        features: the processor's tensors with the answers appended, ready for the model.
        tokens: (batch, width) the answers' ids; mask: (batch, width) float, 1 on real tokens.
    """

    features: dict[str, Any]
    tokens: torch.Tensor
    mask: torch.Tensor


def complete(
    processor,
    opening: list[int],
    texts: list[str],
    pictures: list,
    answers: list[list[int]],
    device,
    dtype,
    images: Sequence[EncodedImage | None] = (),
) -> Completions:
    """Build `Completions` from rendered prompts with one picture each and the ids of their answers.

    Args:
        opening: ids that follow every rendered prompt and are given, not learnt (a forced opening).
        texts: rendered prompts.
        answers: per row a list of ids, not empty.
        images: the pictures as they were encoded; used where none is missing.
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
    if images and None not in images:
        features = with_images(features, images)
    return Completions(features, block[:, skip:], real[:, skip:].float())


def answer_log_probs(model, batch: Completions) -> torch.Tensor:
    """(batch, width) log-probabilities of the answers' tokens, float32 log-softmax over the whole vocabulary.

    Attention masks are the true ones: padding on the left is not attended to. 0 on padding.
    """
    width = batch.tokens.shape[1]
    logits = model(**batch.features, logits_to_keep=width + 1, use_cache=False).logits
    logits = logits[:, -width - 1 : -1].float()
    chosen = logits.gather(-1, batch.tokens.unsqueeze(-1)).squeeze(-1)
    return (chosen - logits.logsumexp(-1)) * batch.mask
