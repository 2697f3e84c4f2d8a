"""Rewards for describing a region so that it can be found again (SC-Tune, arXiv 2403.13263), and the guard against
descriptions that spell where it is.

Every reward function has TRL's protocol: keyword lists of equal length in, a list of floats out, None where it does not
apply. The columns they read: `box` (the region), `located` (where the locator put it, None when its answer had no box),
both (x1, y1, x2, y2) in pixels; `completions` are the descriptions.
"""

import re
from collections.abc import Callable, Sequence

from ..errors import UserError

# (x1, y1, x2, y2), in any one unit
Box = Sequence[float]
Reward = Callable[..., list[float | None]]


def area(box: Box) -> float:
    """Area; 0 for a box that is empty or inside out."""
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def intersection(a: Box, b: Box) -> float:
    if not area(a) or not area(b):
        return 0.0
    return area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))


def iou(a: Box | None, b: Box | None) -> float:
    """Intersection over union in [0, 1]; 0 where a box is missing (unparsed) or empty."""
    if a is None or b is None:
        return 0.0
    common = intersection(a, b)
    return common / (area(a) + area(b) - common) if common else 0.0


def giou(a: Box | None, b: Box | None) -> float:
    """Generalised IoU in [-1, 1] (Rezatofighi et al., CVPR 2019): IoU minus the empty share of the enclosing box.

    Tells a near miss from a far one, where IoU is 0 for both. A missing or empty box counts as the farthest miss, -1.
    """
    if a is None or b is None or not area(a) or not area(b):
        return -1.0
    common = intersection(a, b)
    union = area(a) + area(b) - common
    hull = area((min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])))
    return common / union - (hull - union) / hull


def iou_reward(completions: Sequence, box: Sequence, located: Sequence, **columns) -> list[float]:
    """Intersection over union of region and re-located box: SC-Tune's only reward. A parse failure is 0."""
    return [iou(*boxes) for boxes in zip(located, box, strict=True)]


def giou_reward(completions: Sequence, box: Sequence, located: Sequence, **columns) -> list[float]:
    """Generalised IoU in [-1, 1]: grades misses by their distance."""
    return [giou(*boxes) for boxes in zip(located, box, strict=True)]


def hit_reward(completions: Sequence, box: Sequence, located: Sequence, **columns) -> list[float]:
    """1 where the IoU is at least 0.5, what REC accuracy counts; `threshold_reward` gives other limits."""
    return [float(iou(*boxes) >= 0.5) for boxes in zip(located, box, strict=True)]


def threshold_reward(limit: float) -> Reward:
    """A reward function: 1 where the IoU reaches `limit`, else 0."""
    if not 0 < limit <= 1:
        raise UserError(f"threshold_reward: the limit {limit!r} must lie in (0, 1].")

    def reward(completions: Sequence, box: Sequence, located: Sequence, **columns) -> list[float]:
        return [float(iou(*boxes) >= limit) for boxes in zip(located, box, strict=True)]

    reward.__name__ = f"iou_at_{limit:g}"
    return reward


def parse_reward(completions: Sequence, located: Sequence, **columns) -> list[float]:
    """1 where the locator's answer was a box at all."""
    return [float(box is not None) for box in located]


def length_reward(completions: Sequence, **columns) -> list[float]:
    """Minus the number of words: weigh it small (`reward_weights: [1, 0.01]`) to keep descriptions short."""
    return [-float(len(text_of(completion).split())) for completion in completions]


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

    Raises UserError: no such reward.
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

    Raises UserError: weights of another number, or a function returns a list of another length.
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


# The coordinate-leak guard: a description that spells where the box is earns nothing.
# a comma, or a dot with more than two digits behind it, may stand between two coordinates
_NUMBER = re.compile(r"\d+(?:\.\d{1,2}(?!\d))?")
_LONG = re.compile(r"\d{5}")
_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand point"
)
_WORD = rf"(?:{_UNITS.replace(' ', '|')})\b"
_WORDS = re.compile(rf"\b{_WORD}", re.IGNORECASE)
_PAIR = re.compile(r"[\[(<{]\s*\d+(?:\.\d+)?\s*[,;:/ ]\s*\d+(?:\.\d+)?")
_AXES = re.compile(
    r"\b[xy]\s*[1-4]?\s*[=:]\s*\d|\b(?:bbox|box_start|xyxy|coordinates?)\b|<box|<\|box", re.IGNORECASE
)
# a clock's hands are no corner: 10:45, 10:45:30
_TIME = re.compile(r"(?<![\d:.,])(?:[01]?\d|2[0-4]):[0-5]\d(?::[0-5]\d)?(?![\d:])")
# "12" and "2" of "2.5", but neither "2nd" nor "4x4"
_VALUE = rf"(?:\d+(?:\.\d+)?(?!\w)|{_WORD})"
_SIDE = r"(left|right|top|bottom|upper|lower)"
# 12 %, forty pixels
_SHARE = rf"(?:\d|\b{_WORD})\s*(?:%|per ?cent\b|per ?mille\b|px\b|pixels?\b)"
_SHARES = re.compile(_SHARE, re.IGNORECASE)
# 7 % from the top, 30 percent across
_SHARE_OF_IMAGE = re.compile(
    rf"{_SHARE}\s*(?:in\s+)?(?:of the (?:way|width|height|image|picture)\b|from (?:the )?{_SIDE}\b|across\b)",
    re.IGNORECASE,
)
# what stands beside a number says which coordinate it is; two different ones make a place
_NAMED = (
    re.compile(rf"\b([xywh])\s*[=:]?\s*(?:\d|{_WORD})", re.IGNORECASE),
    re.compile(rf"\b(row|col|column|size|width|height)s?\s*[=:]?\s*{_VALUE}", re.IGNORECASE),
    re.compile(rf"\b{_SIDE}\s*[=:]\s*{_VALUE}", re.IGNORECASE),
    re.compile(rf"(?<![\w.]){_VALUE}\s+from (?:the )?{_SIDE}\b", re.IGNORECASE),
)
LONGEST_RUN = 3


def spells_coordinates(text: str, finds_box: Callable[[str], bool] | None = None) -> bool:
    """Does a description name a place in the image by numbers?

    It does when the convention's own parser finds a box in it, when it has the signs of one (`<box>`, `bbox`, `x=`, a
    bracketed pair of numbers), when it has four or more numbers, or two of two or more digits, or one of five or more
    ("112112224224"), or three number words in a row; or when its numbers say which coordinate they are: two of x, y, w,
    h ("x 12 y 7"), two of row, column, size, width, height ("row 3 column 4"), from two sides ("12 from the left, 7 from
    the top"), a share of the image ("7 percent from the top"), two shares or lengths in pixels. "Player 23", "two dogs",
    "the 2nd of 3" and "a clock showing 10:45" are no leaks.

    Limits. It reads signs, not meaning. It misses one number alone ("40", "1224", "12.24"), one time, with a number
    beside it or not ("10:45", "10:45 12": of a text's first time only how many numbers it has counts), places without
    numbers ("lower left corner"), ordinals ("third row, fourth column"), fractions in words, numbers in other languages,
    and any code of words that describer and locator agree on. It flags honest descriptions with two numbers of two
    digits ("players 23 and 45", "number 23 in 2019"), counts of ten thousand and more ("10,000 people"), numbers
    with three decimals ("12.345"), two numbers beside a time, two percentages, and shelves by row and column.

    Args:
        finds_box: whether the model's box convention reads a box from a text.
    """
    if finds_box is not None and finds_box(text):
        return True
    if _AXES.search(text) or _PAIR.search(text) or _LONG.search(text):
        return True
    if _SHARE_OF_IMAGE.search(text) or len(_SHARES.findall(text)) > 1:
        return True
    if any(len({name.lower() for name in pattern.findall(text)}) > 1 for pattern in _NAMED):
        return True
    if len(_NUMBER.findall(text)) > LONGEST_RUN:
        return True
    text = _TIME.sub(" ", text, count=1)
    if sum(len(re.sub(r"\D", "", number)) > 1 for number in _NUMBER.findall(text)) > 1:
        return True
    run = 0  # number words and digits that stand next to each other
    for word in re.findall(r"[\w']+", text):
        run = run + 1 if word.isdigit() or _WORDS.fullmatch(word) else 0
        if run == LONGEST_RUN:
            return True
    return False
