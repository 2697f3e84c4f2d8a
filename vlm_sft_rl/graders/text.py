"""Reading an output: its final answer, numbers and words; and the graders of answers that are a word or a phrase."""

import re
from fractions import Fraction
from unicodedata import normalize

from ..data.conclusions import conclusion, without_tex
from .grade import NO_ANSWER, Grade, verdict

# `Answer:`, `**Answer**:`, or a line that is only a heading
MARKER = re.compile(
    r"answer[\s*_`]*[:：]|^[ \t#*_`]*(?:the[ \t]+)?(?:final[ \t]+)?answer[ \t#*_`]*$",
    re.IGNORECASE | re.MULTILINE,
)
SAYS = re.compile(r"\banswer\s+is\b[\s:：]*", re.IGNORECASE)
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
BARE_WORDS = 6  # a whole output of at most so many words is an answer by itself
LONGEST_NUMBER = 100  # characters; what is longer ran away
_FRAC = re.compile(
    r"(?P<whole>(?<=\d)\s*)?\\[dt]?frac(?:\s*\{\s*([-+]?[\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}|\s*(\d)\s*(\d))"
)
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")  # one half and its like, each of one character
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?"
_SIMPLE = re.compile(rf"([-+]?)\s*({_NUMBER})(?:\s*/\s*({_NUMBER}))?")
_MIXED = re.compile(r"([-+]?)(\d+)\s+(\d+)\s*/\s*(\d+)")
_RUNAWAY = re.compile(r"[-+]?\d[\d.,/\s]*")
_ARTICLE = re.compile(r"^(?:an?|the)\s+(?=\S)")
_POCKET_CONCLUSION = re.compile(r"so the answer is ([\w-]+)", re.IGNORECASE)


def marked_answer(text: str) -> str | None:
    """The line behind the last `Answer:`, else behind the last "the answer is"; None when there is neither."""
    if marks := list(MARKER.finditer(text)):
        return _line(text[marks[-1].end() :])
    places = [match.end() for match in SAYS.finditer(text)]
    if len(places) > 1 and places[-1] == len(text):  # cut off before it was said again
        places.pop()
    return _line(text[places[-1] :]) if places else None


def final_answer(output: str) -> str | None:
    """The final answer in the conclusion of an output: the marked one, else all that a wrapper holds, else the whole of it
    when it is short enough to be an answer by itself. One line; None when there is none."""
    text, wrapped = conclusion(output)
    if (line := marked_answer(text)) is None:
        line = _line(" ".join(text.split()) if wrapped else text)
        if not wrapped and (len(text.strip().splitlines()) != 1 or len(text.split()) > BARE_WORDS):
            return None
    return line or None


def _line(text: str) -> str:
    """The first line that is not blank, without markup and without the full stop of its sentence."""
    line = next((line for line in text.splitlines() if line.strip()), "")
    line = line.strip().strip("*` ").strip()
    if not re.search(r"[ap]\.m\.$", line, re.IGNORECASE):  # but not of A.M.
        line = line.rstrip(".").rstrip()
    return without_tex(line) if "\\" in line or line.endswith("$") else line


def plain_number(text: str) -> str:
    """The text with fractions (TeX, or of one character) and minus signs written plainly, without `$` around formulas.

    A fraction behind a whole number stays apart from it: `1\\frac{1}{2}` and `1½` are one and a half.
    """
    text = text.replace("\u2212", "-").replace("\\$", "$").replace("\\%", "%")
    text = _VULGAR.sub(lambda m: f" {normalize('NFKC', m[0])}", text).replace("\u2044", "/")
    return _FRAC.sub(_plain_fraction, text)


def _plain_fraction(match: re.Match) -> str:
    return f"{' ' * (match['whole'] is not None)}{match[2] or match[4]}/{match[3] or match[5]}"


def read_number(text: str, units: str = "$%°") -> Fraction | None:
    """The number that `text` is, exactly: `1,200`, `-0.5`, `3/4`, `1 1/2`, `$5.00`, `12%`; None for anything else.

    A text of digits that ran away (more than LONGEST_NUMBER characters) is read as a number beyond every true answer: it is
    wrong, not unreadable.

    Args:
        units: single characters that may stand before or behind it.
    """
    text = plain_number(text).strip()
    sign = ""
    if text[:1] in "+-" and text[1:2] and text[1] in units:  # -$3
        sign, text = text[0], text[1:]
    text = text.strip(units + " ")
    if len(text) > LONGEST_NUMBER:
        return Fraction(10) ** LONGEST_NUMBER if ran_away(text) else None
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


def ran_away(text: str) -> bool:
    """Whether a text is nothing but digits and their punctuation, and more of it than any true number."""
    return len(text) > LONGEST_NUMBER and _RUNAWAY.fullmatch(text) is not None


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
    conclusions = _POCKET_CONCLUSION.findall(conclusion(output).text)
    text = conclusions[-1] if conclusions else final_answer(output)
    if text is None or len(text.split()) != 1:
        return NO_ANSWER
    keys = []
    for word in (text, question["answer"]):
        number = read_number(word)
        keys.append(words_key(word) if number is None else number_key(number))
    return verdict(text, keys[0], keys[0] == keys[1])
