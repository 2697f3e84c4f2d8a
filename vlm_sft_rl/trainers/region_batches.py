"""Region rows as batches of tokens: a box to learn, and what the start-up report measures."""

from collections.abc import Sequence

import torch

from ..data.marks import IGNORE
from ..data.regions import RegionCollator
from ..models.region_prompts import STAND_IN, RegionPrompts
from .completions import Completions, ImagePrefix, complete, complete_prefixes


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
