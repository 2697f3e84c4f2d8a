"""Finding the answer in an output, and reading numbers exactly."""

import re
from fractions import Fraction

MARKER = re.compile(r"answer\s*[:：]", re.IGNORECASE)
CONCLUSION = re.compile(r"\b(?:the\s+)?(?:final\s+)?answer\s+is\s*:?\s*(.+)", re.IGNORECASE)
BARE_WORDS = 6  # a whole output of at most so many words is an answer by itself
_FRAC = re.compile(r"\\[dt]?frac\s*\{\s*([-+]?[\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}")
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?"
_SIMPLE = re.compile(rf"([-+]?)\s*({_NUMBER})(?:\s*/\s*({_NUMBER}))?")
_MIXED = re.compile(r"([-+]?)(\d+)\s+(\d+)\s*/\s*(\d+)")


def final_answer(output: str) -> str | None:
    """The text of the last answer: behind the last `Answer:`, else behind the last "the answer is", else the whole
    output when it is short enough to be an answer by itself. One line; None when there is none."""
    marks = list(MARKER.finditer(output))
    if marks:
        return _first_line(output[marks[-1].end() :])
    concluded = CONCLUSION.findall(output)
    if concluded:
        return _first_line(concluded[-1])
    lines = [line for line in output.splitlines() if line.strip()]
    if len(lines) == 1 and len(lines[0].split()) <= BARE_WORDS:
        return _first_line(lines[0])
    return None


def _first_line(text: str) -> str | None:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    line = line.strip("*` ").strip()
    return _without_dot(line) or None


def _without_dot(text: str) -> str:
    """Without the full stop of the sentence; that of A.M. and P.M. stays."""
    return text if re.search(r"[ap]\.m\.$", text, re.IGNORECASE) else text.rstrip(".").rstrip()


def plain_number(text: str) -> str:
    """The text with TeX fractions and typographic minus signs written plainly, without `$` around formulas."""
    text = text.replace("\u2212", "-").replace("\\$", "$").replace("\\%", "%")
    return _FRAC.sub(lambda m: f"{m[1]}/{m[2]}", text)


def read_number(text: str, units: str = "$%°") -> Fraction | None:
    """The number that `text` is, exactly: `1,200`, `-0.5`, `3/4`, `1 1/2`, `$5.00`, `12%`; None for anything else.

    Args:
        units: single characters that may stand before or behind it.
    """
    text = plain_number(text).strip()
    sign = ""
    if text[:1] in "+-" and text[1:2] and text[1] in units:  # -$3
        sign, text = text[0], text[1:]
    text = text.strip(units + " ")
    if (mixed := _MIXED.fullmatch(text)) and int(mixed[4]):
        value = int(mixed[2]) + Fraction(int(mixed[3]), int(mixed[4]))
        return -value if "-" in (sign, mixed[1]) else value
    simple = _SIMPLE.fullmatch(text)
    if not simple or not simple[2] or (simple[3] is not None and not simple[3]):
        return None
    value = Fraction(simple[2].replace(",", ""))
    if simple[3]:
        below = Fraction(simple[3].replace(",", ""))
        if not below:
            return None
        value /= below
    return -value if "-" in (sign, simple[1]) else value


def number_key(value: Fraction) -> str:
    """One text for one value: whole numbers as such, others rounded to six places."""
    if value.denominator == 1:
        return str(value.numerator)
    return f"{float(value):.6f}".rstrip("0").rstrip(".")


def words_key(text: str) -> str:
    """Text without case, doubled blanks and closing punctuation."""
    return " ".join(text.casefold().split()).strip(" .,;:!\"'")
