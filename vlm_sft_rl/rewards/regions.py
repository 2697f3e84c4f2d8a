"""Reward functions for describing a region so that it can be found again (SC-Tune, arXiv 2403.13263).

Every function has TRL's protocol: keyword lists of equal length in, a list of floats out, None where it does not apply.
The columns they read: `box` (the region), `located` (where the locator put it, None when its answer had no box), both
(x1, y1, x2, y2) in pixels; `completions` are the descriptions.
"""

from collections.abc import Callable, Sequence

from ..errors import UserError
from .boxes import giou, iou

Reward = Callable[..., list[float | None]]


def iou_reward(completions: Sequence, box: Sequence, located: Sequence, **columns) -> list[float]:
    """Intersection over union of region and re-located box: SC-Tune's only reward. A parse failure is 0."""
    return [iou(one, other) for one, other in zip(located, box, strict=True)]


def giou_reward(completions: Sequence, box: Sequence, located: Sequence, **columns) -> list[float]:
    """Generalised IoU in [-1, 1]: grades misses by their distance."""
    return [giou(one, other) for one, other in zip(located, box, strict=True)]


def hit_reward(completions: Sequence, box: Sequence, located: Sequence, **columns) -> list[float]:
    """1 where the IoU is at least 0.5, what REC accuracy counts; `threshold_reward` gives other limits."""
    return [float(iou(one, other) >= 0.5) for one, other in zip(located, box, strict=True)]


def parse_reward(completions: Sequence, located: Sequence, **columns) -> list[float]:
    """1 where the locator's answer was a box at all."""
    return [float(one is not None) for one in located]


def threshold_reward(limit: float) -> Reward:
    """A reward function: 1 where the IoU reaches `limit`, else 0."""
    if not 0 < limit <= 1:
        raise UserError(f"threshold_reward: the limit {limit!r} must lie in (0, 1].")

    def reward(completions: Sequence, box: Sequence, located: Sequence, **columns) -> list[float]:
        return [float(iou(one, other) >= limit) for one, other in zip(located, box, strict=True)]

    reward.__name__ = f"iou_at_{limit:g}"
    return reward


def length_reward(completions: Sequence, **columns) -> list[float]:
    """Minus the number of words: weigh it small (`reward_weights: [1, 0.01]`) to keep descriptions short."""
    return [-float(len(text_of(one).split())) for one in completions]


def text_of(completion) -> str:
    """The text of a completion: a string, or TRL's conversational form."""
    return completion if isinstance(completion, str) else "".join(turn["content"] for turn in completion)


REWARDS: dict[str, Reward] = {
    "iou": iou_reward,
    "giou": giou_reward,
    "hit": hit_reward,
    "parse": parse_reward,
    "length": length_reward,
}


def reward_named(name: str) -> Reward:
    """The reward function a recipe names: iou, giou, hit, parse, length, or `iou@0.7` for another threshold.

    Raises:
        UserError: no such reward.
    """
    if name.startswith("iou@"):
        try:
            return threshold_reward(float(name.removeprefix("iou@")))
        except ValueError:
            pass
    if name not in REWARDS:
        raise UserError(f"rewards: {name!r} is unknown. Known: {', '.join(REWARDS)}, and iou@LIMIT.")
    return REWARDS[name]


def check_weights(rewards: Sequence, weights: Sequence[float] | None) -> None:
    """Raises UserError: there are not as many weights as rewards."""
    if weights is not None and len(weights) != len(rewards):
        raise UserError(
            f"reward_weights: {len(weights)} weights for {len(rewards)} rewards. Give one for each."
        )


def combine(
    functions: Sequence[Reward], weights: Sequence[float] | None, count: int, columns: dict
) -> tuple[list[float], dict[str, list[float | None]]]:
    """The weighted sum of reward functions for each of `count` samples, and each function's own values.

    A function that gives None for a sample is left out of that sample's sum, as in TRL.

    Raises:
        UserError: weights of another number, or a function returns a list of another length.
    """
    check_weights(functions, weights)
    weights = [1.0] * len(functions) if weights is None else list(weights)
    total, parts = [0.0] * count, {}
    for function, weight in zip(functions, weights, strict=True):
        name = getattr(function, "__name__", type(function).__name__)
        values = function(**columns)
        if len(values) != count:
            raise UserError(f"reward function {name} returned {len(values)} values for {count} samples.")
        parts[name] = list(values)
        total = [t + (0.0 if v is None else weight * v) for t, v in zip(total, values, strict=True)]
    return total, parts
