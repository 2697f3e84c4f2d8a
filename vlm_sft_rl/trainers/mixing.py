"""Rows mixed into locator steps: which ones a step draws, and ordinary SFT rows as batches of answers."""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..data.marks import IGNORE
from .completions import Completions


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
