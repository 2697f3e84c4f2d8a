"""The coordinate-leak guard: a description that spells where the box is earns nothing.

The locator reads what the describer writes. If that may be coordinates, the loop closes perfectly without anything
being described, and nothing in an IoU reward speaks against it.
"""

import re
from collections.abc import Callable

# a comma, or a dot with more than two digits behind it, may stand between two coordinates
NUMBER = re.compile(r"\d+(?:\.\d{1,2}(?!\d))?")
LONG = re.compile(r"\d{5}")
UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
)
WORD = (
    rf"(?:{'|'.join(UNITS.split())}|seventeen|eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|"
    r"ninety|hundred|thousand|point)\b"
)
WORDS = re.compile(rf"\b{WORD}", re.IGNORECASE)
PAIR = re.compile(r"[\[(<{]\s*\d+(?:\.\d+)?\s*[,;:/ ]\s*\d+(?:\.\d+)?")
AXES = re.compile(
    r"\b[xy]\s*[1-4]?\s*[=:]\s*\d|\b(?:bbox|box_start|xyxy|coordinates?)\b|<box|<\|box", re.IGNORECASE
)
# a clock's hands are no corner: 10:45, 10:45:30
TIME = re.compile(r"(?<![\d:.,])(?:[01]?\d|2[0-4]):[0-5]\d(?::[0-5]\d)?(?![\d:])")
# "12" and "2" of "2.5", but neither "2nd" nor "4x4"
VALUE = rf"(?:\d+(?:\.\d+)?(?!\w)|{WORD})"
UNIT = r"(?:%|per ?cent\b|per ?mille\b|px\b|pixels?\b)"
SIDE = r"(left|right|top|bottom|upper|lower)"
SHARE = re.compile(rf"(?:\d|\b{WORD})\s*{UNIT}", re.IGNORECASE)
# 7 % from the top, 30 percent across
SHARE_OF_IMAGE = re.compile(
    rf"(?:\d|\b{WORD})\s*{UNIT}\s*(?:in\s+)?(?:of the (?:way|width|height|image|picture)\b|"
    rf"from (?:the )?{SIDE}\b|across\b)",
    re.IGNORECASE,
)
# what stands beside a number says which coordinate it is; two different ones make a place
NAMED = (
    re.compile(rf"\b([xywh])\s*[=:]?\s*(?:\d|{WORD})", re.IGNORECASE),
    re.compile(rf"\b(row|col|column|size|width|height)s?\s*[=:]?\s*{VALUE}", re.IGNORECASE),
    re.compile(rf"\b{SIDE}\s*[=:]\s*{VALUE}", re.IGNORECASE),
    re.compile(rf"(?<![\w.]){VALUE}\s+from (?:the )?{SIDE}\b", re.IGNORECASE),
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
    if AXES.search(text) or PAIR.search(text) or LONG.search(text) or _names_coordinates(text):
        return True
    if len(NUMBER.findall(text)) > LONGEST_RUN:
        return True
    text = TIME.sub(" ", text, count=1)
    if sum(len(re.sub(r"\D", "", number)) > 1 for number in NUMBER.findall(text)) > 1:
        return True
    return _longest_run(text) >= LONGEST_RUN


def _names_coordinates(text: str) -> bool:
    """Are there two numbers with the names of different coordinates, or shares of the image?"""
    if SHARE_OF_IMAGE.search(text) or len(SHARE.findall(text)) > 1:
        return True
    return any(len({name.lower() for name in pattern.findall(text)}) > 1 for pattern in NAMED)


def _longest_run(text: str) -> int:
    """The most number words and digits that stand next to each other."""
    best = run = 0
    for word in re.findall(r"[\w']+", text):
        run = run + 1 if word.isdigit() or WORDS.fullmatch(word) else 0
        best = max(best, run)
    return best
