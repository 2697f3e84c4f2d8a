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
    tokens, others = _by_tokens(inputs)
    others = {name: value for name, value in others.items() if not is_pixels(name)}
    return [
        ImagePrefix(prefix, {name: value[i : i + 1] for name, value in others.items()}, image)
        for i, (prefix, image) in enumerate(zip(_cut(tokens, tails), images, strict=True))
    ]


def _by_tokens(inputs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A processor's tensors with one entry a token, and the others."""
    shape = inputs["input_ids"].shape
    names = {name for name, value in inputs.items() if torch.is_tensor(value) and value.shape == shape}
    return (
        {name: value for name, value in inputs.items() if name in names},
        {name: value for name, value in inputs.items() if name not in names},
    )


def _cut(tokens: dict[str, torch.Tensor], tails: Sequence[list[int]]) -> list[dict[str, torch.Tensor]]:
    """Each row's tokens up to the end of its image, without padding."""
    prefixes = []
    for i, tail in enumerate(tails):
        places = tokens["attention_mask"][i].nonzero().squeeze(1)
        places = places[: len(places) - len(tail)]
        prefixes.append({name: value[i, places] for name, value in tokens.items()})
    return prefixes


def complete(
    prompts: RegionPrompts,
    rows: Sequence[dict],
    tails: Sequence[list[int]],
    answers: Sequence[list[int]],
    prefixes: Sequence[ImagePrefix | None],
    device: torch.device,
    dtype: torch.dtype,
) -> Completions:
    """Questions about the rows' images with given answers.

    Args:
        rows: opened region rows (`picture`, and `resized` for conventions that need it).
        tails: per row the ids between image and answer, a forced opening included.
        answers: per row a list of ids, not empty.
        prefixes: the rows' images as they were opened. Where one is missing all are prepared anew, to be encoded in the
            pass itself.
    """
    processor, images = prompts.processor, None
    if None in prefixes:
        texts = [prompts.describe(row) for row in rows]
        inputs = processor(
            text=texts,
            images=[[row["picture"]] for row in rows],
            padding=True,
            padding_side="left",
            return_tensors="pt",
            add_special_tokens=not prompts.renderer.has_bos,
        )
        tokens, others = _by_tokens(dict(inputs.to(device, dtype=dtype)))
        tokens = _cut(tokens, [prompts.describe_tail(row) for row in rows])
    else:
        tokens = [prefix.tokens for prefix in prefixes]
        others = {
            name: torch.cat([prefix.others[name] for prefix in prefixes]) for name in prefixes[0].others
        }
        images = [prefix.image for prefix in prefixes]
    lengths = [len(prefix["input_ids"]) + len(tail) for prefix, tail in zip(tokens, tails, strict=True)]
    longest, width = max(lengths), max(map(len, answers))
    features = {}
    for name, first in tokens[0].items():
        fill = (processor.tokenizer.pad_token_id or 0) if name == "input_ids" else 0
        block = first.new_full((len(tokens), longest + width), fill)
        for row, prefix, tail, answer, length in zip(block, tokens, tails, answers, lengths, strict=True):
            row[longest - length : longest - len(tail)] = prefix[name]
            # what stands behind the image is text, whose token type is 0 in every family
            if name == "input_ids":
                row[longest - len(tail) : longest + len(answer)] = first.new_tensor([*tail, *answer])
            elif name == "attention_mask":
                row[longest - len(tail) : longest + len(answer)] = 1
        features[name] = block
    block = features["attention_mask"][:, longest:]
    return Completions(features | others, features["input_ids"][:, longest:], block.float(), images)


def describing(
    prompts: RegionPrompts,
    rows: Sequence[dict],
    answers: Sequence[list[int]],
    prefixes: Sequence[ImagePrefix | None],
    device: torch.device,
    dtype: torch.dtype,
) -> Completions:
    """The question what is in each row's box, with the ids of a description as its answer. See `complete`."""
    tails = [prompts.describe_tail(row) for row in rows]
    return complete(prompts, rows, tails, answers, prefixes, device, dtype)


def locating(
    prompts: RegionPrompts,
    rows: Sequence[dict],
    descriptions: Sequence[str],
    prefixes: Sequence[ImagePrefix | None],
    device: torch.device,
    dtype: torch.dtype,
) -> Completions:
    """The question where each description is, with the row's box as its answer. See `complete`."""
    tails = [prompts.locate_tail(text) for text in descriptions]
    answers = [
        prompts.target(text, row["box"], (row["width"], row["height"]), row["resized"]).answer
        for row, text in zip(rows, descriptions, strict=True)
    ]
    return complete(prompts, rows, tails, answers, prefixes, device, dtype)


def from_collator(
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


@dataclass(frozen=True)
class Suppressed:
    """Tokens that are not sampled: `never` at no place, `ends` not among the first `before` tokens of an answer."""

    never: Sequence[int] = ()
    ends: Sequence[int] = ()
    before: int = 0


def answer_log_probs(
    model, batch: Completions, suppressed: Suppressed = Suppressed(), temperature: float = 1.0
) -> torch.Tensor:
    """(batch, width) log-probabilities of the answers' tokens, float32 log-softmax over what may be said.

    Attention masks are the true ones: padding on the left is not attended to. 0 on padding.

    Args:
        suppressed: left out of the softmax as sampling leaves it out: a policy could else give its probability to tokens
            that it never has to answer for.
        temperature: at which the answers were sampled.
    """
    width = batch.tokens.shape[1]
    # here and not once for all passes: a projector that is trained has other weights in each
    features = batch.features if batch.images is None else with_images(model, batch.features, batch.images)
    logits = model(**features, logits_to_keep=width + 1, use_cache=False).logits
    logits = logits[:, -width - 1 : -1].float()
    if temperature != 1:
        logits = logits / temperature
    if suppressed.never or suppressed.before:
        forbidden = torch.zeros(width, logits.shape[-1], dtype=torch.bool, device=logits.device)
        forbidden[:, list(suppressed.never)] = True
        forbidden[: suppressed.before, list(suppressed.ends)] = True
        logits = logits.masked_fill(forbidden, float("-inf"))
    chosen = logits.gather(-1, batch.tokens.unsqueeze(-1)).squeeze(-1)
    return (chosen - logits.logsumexp(-1)).where(batch.mask > 0, 0.0) * batch.mask


class DrawnRow(NamedTuple):
    """One row mixed into a step: its number, a number from [0, 1), and 1 or 0: whether it counts."""

    row: int
    part: float
    weight: float


def draw_rows(
    rows: int, share: float, boxes: int, *, name: str, seed: int, step: int, processes: int, rank: int
) -> list[DrawnRow]:
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
    together = [DrawnRow(rng.randrange(rows), rng.random(), 1.0) for _ in range(total)]
    each = math.ceil(total / processes)
    together += [together[0]._replace(weight=0.0)] * (each * processes - total) if together else []
    return together[rank * each : (rank + 1) * each]


class RegionPreview:
    """A collator for the report before step 1: rows -> the processor's tensors and `labels` (rows, length).

    Supervised are the tokens of each row's box; the description is the row's first expression, or a stand-in.
    """

    def __init__(self, collator: RegionCollator, prompts: RegionPrompts):
        self.collator, self.prompts = collator, prompts

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        rows = self.prompts.with_sizes(self.collator(rows)["rows"])
        texts = [(row.get("expressions") or [STAND_IN])[0] for row in rows]
        batch = locating(self.prompts, rows, texts, [None], torch.device("cpu"), torch.float32)
        labels = torch.full_like(batch.features["input_ids"], IGNORE)
        labels[:, -batch.tokens.shape[1] :] = batch.tokens.masked_fill(batch.mask == 0, IGNORE)
        return {**batch.features, "labels": labels}
