"""Reading an output: its final answer, numbers and words; and the graders of answers that are a word or a phrase."""

import re
from fractions import Fraction

from .grade import NO_ANSWER, Grade, verdict

MARKER = re.compile(r"answer\s*[:：]", re.IGNORECASE)
CONCLUSION = re.compile(r"\b(?:the\s+)?(?:final\s+)?answer\s+is\s*:?\s*(.+)", re.IGNORECASE)
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
BARE_WORDS = 6  # a whole output of at most so many words is an answer by itself
_FRAC = re.compile(r"\\[dt]?frac\s*\{\s*([-+]?[\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}")
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?"
_SIMPLE = re.compile(rf"([-+]?)\s*({_NUMBER})(?:\s*/\s*({_NUMBER}))?")
_MIXED = re.compile(r"([-+]?)(\d+)\s+(\d+)\s*/\s*(\d+)")
_ARTICLE = re.compile(r"^(?:an?|the)\s+(?=\S)")
_POCKET_CONCLUSION = re.compile(r"so the answer is ([\w-]+)", re.IGNORECASE)


def final_answer(output: str) -> str | None:
    """The text of the last answer: behind the last `Answer:`, else behind the last "the answer is", else the whole
    output when it is short enough to be an answer by itself. One line; None when there is none."""
    if marks := list(MARKER.finditer(output)):
        text = output[marks[-1].end() :]
    elif conclusions := CONCLUSION.findall(output):
        text = conclusions[-1]
    else:
        text = output.strip()
        if len(text.splitlines()) != 1 or len(text.split()) > BARE_WORDS:
            return None
    line = next((line for line in text.splitlines() if line.strip()), "")
    line = line.strip().strip("*` ").strip()
    if not re.search(r"[ap]\.m\.$", line, re.IGNORECASE):  # the full stop of the sentence, but not of A.M.
        line = line.rstrip(".").rstrip()
    return line or None


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
        denominator = Fraction(simple[3].replace(",", ""))
        if not denominator:
            return None
        value /= denominator
    return -value if "-" in (sign, simple[1]) else value


def number_key(value: Fraction) -> str:
    """One text for one value: whole numbers as such, others rounded to six places."""
    if value.denominator == 1:
        return str(value.numerator)
    return f"{float(value):.6f}".rstrip("0").rstrip(".")


def words_key(text: str) -> str:
    """Text without case, doubled blanks and closing punctuation."""
    return " ".join(text.casefold().split()).strip(" .,;:!\"'")


def without_unit(text: str, unit: str) -> str:
    """The text without the question's unit at its end; as it is where nothing else would be left."""
    bare = text.rstrip(" .")
    if not unit or not bare.casefold().endswith(unit.casefold()):
        return text
    return bare[: -len(unit)].strip() or text


def exact(output: str, question: dict) -> Grade:
    """One word or phrase, equal to the gold answer (GQA and sets like it); a leading article does not count."""
    text = final_answer(output)
    if text is None:
        return NO_ANSWER
    key, gold = (_ARTICLE.sub("", words_key(phrase)) for phrase in (text, question["answer"]))
    return verdict(text, key, key == gold)


def exact_released(output: str, question: dict) -> Grade:
    """LLaVA's rule for GQA: the whole output, lower-cased, without a full stop at its end, equals the gold answer."""
    text = output.strip().lower().rstrip(".")
    return verdict(text, text, text == question["answer"].lower())


def pocket(output: str, question: dict) -> Grade:
    """The pocket world's problems: `So the answer is X.`, one word. There are no released rules."""
    conclusions = _POCKET_CONCLUSION.findall(output)
    text = conclusions[-1] if conclusions else final_answer(output)
    if text is None or len(text.split()) != 1:
        return NO_ANSWER
    keys = []
    for word in (text, question["answer"]):
        number = read_number(word)
        keys.append(words_key(word) if number is None else number_key(number))
    return verdict(text, keys[0], keys[0] == keys[1])
