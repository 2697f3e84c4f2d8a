"""Batches of prompts with given answers, and the log-probabilities of the answers' tokens."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ...data.collators import RegionCollator
from ...data.marks import IGNORE
from ...models.images import EncodedImage, is_pixels, with_images
from ...models.regions import STAND_IN, RegionPrompts


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


# Region rows as batches of tokens: a box to learn, and what the start-up report measures.
def describing(
    prompts: RegionPrompts,
    rows: Sequence[dict],
    answers: Sequence[list[int]],
    prefixes: Sequence[ImagePrefix | None],
    device: torch.device,
    dtype: torch.dtype,
) -> Completions:
    """The question what is in each row's box, with the ids of a description as its answer.

    Args:
        prefixes: the rows' images as they were opened; used where none is missing.
    """
    if None not in prefixes:
        tails = [prompts.describe_tail(row) for row in rows]
        return complete_prefixes(prefixes, tails, answers, prompts.processor.tokenizer.pad_token_id)
    texts, pictures = [prompts.describe(row) for row in rows], [row["picture"] for row in rows]
    return complete(prompts.processor, [], texts, pictures, answers, device, dtype)


def locating(
    prompts: RegionPrompts,
    pairs: Sequence[tuple[dict, str]],
    device: torch.device,
    dtype: torch.dtype,
    prefixes: Sequence[ImagePrefix | None] | None = None,
) -> Completions:
    """The question where each description is, with the row's box as its answer.

    Args:
        pairs: opened region rows (`picture`, and `resized` for conventions that need it) and their descriptions.
        prefixes: the rows' images as they were opened; used where none is missing.
    """
    targets = [
        prompts.target(text, row["box"], (row["width"], row["height"]), row["resized"]).answer
        for row, text in pairs
    ]
    if prefixes is not None and None not in prefixes:
        tails = [prompts.locate_tail(text) for _, text in pairs]
        return complete_prefixes(prefixes, tails, targets, prompts.processor.tokenizer.pad_token_id)
    texts = [prompts.render(prompts.locate(text)) for _, text in pairs]
    pictures = [row["picture"] for row, _ in pairs]
    return complete(prompts.processor, prompts.opening, texts, pictures, targets, device, dtype)


class RegionPreview:
    """A collator for the report before step 1: rows -> the processor's tensors and `labels` (rows, length).

    Supervised are the tokens of each row's box; the description is the row's first expression, or a stand-in.
    """

    def __init__(self, collator: RegionCollator, prompts: RegionPrompts):
        self.collator, self.prompts = collator, prompts

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        opened = self.prompts.with_sizes(self.collator(rows)["rows"])
        pairs = [(row, (row.get("expressions") or [STAND_IN])[0]) for row in opened]
        batch = locating(self.prompts, pairs, torch.device("cpu"), torch.float32)
        labels = torch.full_like(batch.features["input_ids"], IGNORE)
        labels[:, -batch.tokens.shape[1] :] = batch.tokens.masked_fill(batch.mask == 0, IGNORE)
        return {**batch.features, "labels": labels}


# Rows mixed into locator steps: which ones a step draws, and ordinary SFT rows as batches of answers.
class Drawn(NamedTuple):
    """One row mixed into a step: its number, a number from [0, 1), and 1 or 0: whether it counts."""

    row: int
    part: float
    weight: float


def drawn(
    rows: int, share: float, boxes: int, *, name: str, seed: int, step: int, processes: int, rank: int
) -> list[Drawn]:
    """What one process mixes into one step of `share` rows a box, drawn with replacement.

    Together the processes draw ceil(share * boxes of all), whatever their number, and all get equally many: processes that
    make different numbers of passes would wait for each other. What is missing to that is filled up by rows that do not
    count.

    A function of its arguments alone, so a resumed run draws what it would have drawn; processes draw together what one
    with all of their boxes draws.

    Args:
        rows: rows to draw from; boxes: of this process in this step, as of every other; name: of the file's role, so that
            two files draw apart.
    """
    # 0.07 * 100 is a little more than 7
    total = math.ceil(round(share * boxes * processes, 9))
    rng = random.Random(f"{seed}\x1f{name}\x1f{step}")
    together = [Drawn(rng.randrange(rows), rng.random(), 1.0) for _ in range(total)]
    each = math.ceil(total / processes)
    together += [together[0]._replace(weight=0.0)] * (each * processes - total) if together else []
    return together[rank * each : (rank + 1) * each]


def answers_of(
    batch: dict[str, torch.Tensor], weights: Sequence[float], device: torch.device, dtype: torch.dtype
) -> Completions:
    """A batch of `VisionCollator` (padded on the left) as completions: from the first supervised column to the end.

    `weights` has a factor for each of its rows. Text between the answers of a conversation has mask 0.
    """
    labels, mask = batch["labels"], batch["loss_weights"].clone()
    # the collator may have put a row behind them
    mask[: len(weights)] *= torch.tensor(weights)[:, None]
    first = int((labels != IGNORE).any(0).nonzero()[0])
    features = {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype)
        for name, value in batch.items()
        if name not in ("labels", "loss_weights")
    }
    return Completions(features, features["input_ids"][:, first:], mask[:, first:].to(device))
