"""The coordinate-leak guard: a description that spells where the box is earns nothing.

The locator reads what the describer writes. If that may be coordinates, the loop closes perfectly without anything
being described, and nothing in an IoU reward speaks against it.
"""

import re
from collections.abc import Callable

NUMBER = re.compile(r"\d+(?:[.,]\d+)?")
UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
)
WORDS = re.compile(
    rf"\b(?:{'|'.join(UNITS.split())}|seventeen|eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|"
    r"ninety|hundred|thousand|point)\b",
    re.IGNORECASE,
)
PAIR = re.compile(r"[\[(<{]\s*\d+(?:\.\d+)?\s*[,;:/ ]\s*\d+(?:\.\d+)?")
AXES = re.compile(
    r"\b[xy]\s*[1-4]?\s*[=:]\s*\d|\b(?:bbox|box_start|xyxy|coordinates?)\b|<box|<\|box", re.IGNORECASE
)
LONGEST_RUN = 3


def spells_coordinates(text: str, finds_box: Callable[[str], bool] | None = None) -> bool:
    """Does a description name a place in the image by numbers?

    It does when the convention's own parser finds a box in it, when it has the signs of one (`<box>`, `bbox`, `x=`, a
    bracketed pair of numbers), when it has four or more numbers, or two of two or more digits, or three number
    words in a row. "Player 23", "two dogs" and "the 2nd of 3" are no leaks.

    Args:
        finds_box: whether the model's box convention reads a box from a text.
    """
    if finds_box is not None and finds_box(text):
        return True
    if AXES.search(text) or PAIR.search(text):
        return True
    numbers = NUMBER.findall(text)
    if len(numbers) > LONGEST_RUN or sum(len(re.sub(r"\D", "", number)) > 1 for number in numbers) > 1:
        return True
    return _longest_run(text) >= LONGEST_RUN


def _longest_run(text: str) -> int:
    """The most number words and digits that stand next to each other."""
    best = run = 0
    for word in re.findall(r"[\w']+", text):
        run = run + 1 if word.isdigit() or WORDS.fullmatch(word) else 0
        best = max(best, run)
    return best
