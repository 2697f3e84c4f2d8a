"""Rows mixed into locator steps: which ones a step draws, and ordinary SFT rows as batches of answers."""

import math
import random

import torch

from ..data.marks import IGNORE
from .completions import Completions


def drawn(
    rows: int, share: float, boxes: int, *, name: str, seed: int, step: int, processes: int, rank: int
) -> list[tuple[int, float]]:
    """What one process mixes into one step: ceil(share * boxes) pairs (row, number from [0, 1)), with replacement.

    A function of its arguments alone, so a resumed run draws what it would have drawn; two processes with half of the
    boxes each draw together what one with all of them draws.

    Args:
        rows: rows to draw from; boxes: of this process in this step; name: of the file's role, so that two files
            draw apart.
    """
    count = math.ceil(share * boxes)
    rng = random.Random(f"{seed}\x1f{name}\x1f{step}")
    together = [(rng.randrange(rows), rng.random()) for _ in range(count * processes)]
    return together[rank * count : (rank + 1) * count]


def answers_of(batch: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype) -> Completions:
    """A batch of `VisionCollator` (padded on the left) as completions: from the first supervised column to the end.

    Text between the answers of a conversation has mask 0.
    """
    labels, weights = batch["labels"], batch["loss_weights"]
    first = int((labels != IGNORE).any(0).nonzero()[0])
    features = {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype)
        for name, value in batch.items()
        if name not in ("labels", "loss_weights")
    }
    return Completions(features, features["input_ids"][:, first:], weights[:, first:].to(device))
