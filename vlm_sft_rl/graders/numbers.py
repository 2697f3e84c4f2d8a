"""The graders of sets whose answers are mostly numbers: ChartQA, CLEVR-Math, TabMWP, MathVista and MMMU."""

import re
from fractions import Fraction

from ..errors import UserError, short
from .choice import LETTERS, choice, gold_letter
from .grade import NO_ANSWER, Grade, verdict
from .text import DIGITS, final_answer, number_key, read_number, without_unit, words_key

CHARTQA_TOLERANCE = 0.05
TABMWP_DECIMALS = 3
MOST_DECIMALS = 20
_RELEASED_LETTERS = "ABCDEF"
_SAYS = "(?:T|h)he answer is"  # "The", or "hhe", which a slip lets in; never "the"
# in this order; there is no "Answer: (B)"
_CHOICE_PATTERNS = (
    "Answer: ([a-zA-Z])",  # no boundary: "Answer: Friday" says F
    r"^\(([a-zA-Z])\)$",
    "^([a-zA-Z])$",
    "^([a-zA-Z]). ",  # whatever one character follows: "Be careful" says B
    f"{_SAYS} ([A-Z])",
    r"(?s)^\(([a-zA-Z])\) .+$",
    rf"(?s){_SAYS} \(([a-zA-Z])\) .+$",
)
_AMOUNT, _PIECE = r"([\d$.,/:]+)", r"([-\d$.,/:]*\d)"
_FREE_PATTERNS = (
    "(?s)Answer: (.+)",
    f"(?s){_SAYS} (.+)$",
    rf"(?:T|h)he table shows that {_AMOUNT} ",
    rf" = {_AMOUNT}",
    rf" (?:be|is) {_PIECE}",
    rf" (?:are|was) {_PIECE}",
    rf" were {_PIECE}",
    r" ([\d$.,/:]+ [AP]\.M\.)",
)
_RUN = re.compile(r"[-\d$.,/:]+")
_RELEASED_FRACTION = re.compile(r"\$?\\frac\{([\d.,-]+)\}\{([\d.,]+)\}\$?")


def chartqa(output: str, question: dict) -> Grade:
    """Numbers within five per cent of the gold answer, texts and lists equal."""
    text, gold = final_answer(output), question["answer"]
    if text is None:
        return NO_ANSWER
    value, gold_value = read_number(text), read_number(gold)
    if gold_value is None:
        items = _list_items(text)
        return verdict(text, ", ".join(items), items == _list_items(gold))
    if value is None:
        return verdict(text, words_key(text), False)
    return verdict(text, number_key(value), abs(value - gold_value) <= CHARTQA_TOLERANCE * abs(gold_value))


def _list_items(text: str) -> list[str]:
    """The parts of a list answer such as `[2012, 2014]`; one part otherwise."""
    text = text.strip()
    parts = text[1:-1].split(",") if text.startswith("[") and text.endswith("]") else [text]
    return [words_key(part) for part in parts]


def chartqa_released(output: str, question: dict) -> Grade:
    """Everything behind the first `Answer:`, without cleaning, so `5%` is no number."""
    marked = re.search(r"Answer:(.*)", output, re.DOTALL)
    text = (marked[1] if marked else output).strip()
    gold = question["answer"]
    try:
        value, gold_value = float(text), float(gold)
        near = abs(value - gold_value) <= CHARTQA_TOLERANCE * abs(gold_value)
    except ValueError:
        near = False
    return verdict(text, text, near or text.lower() == gold.strip().lower())


def clevr_math(output: str, question: dict) -> Grade:
    """Whole numbers, as digits or words."""
    gold = _integer(question["answer"])
    if gold is None:
        raise UserError(
            f"question {question.get('id')!r}: the answer {question['answer']!r} is no whole number."
        )
    text = final_answer(output)
    number = None if text is None else _integer(text)
    return NO_ANSWER if number is None else verdict(text, str(number), number == gold)


def _integer(text: str) -> int | None:
    word = text.split()[0].strip(".,").lower() if text.split() else ""
    if word in DIGITS:
        return DIGITS.index(word)
    value = read_number(text)
    if value is None:  # "3 spheres"
        value = read_number(word)
    return int(value) if value is not None and value.denominator == 1 else None


def clevr_math_released(output: str, question: dict) -> Grade:
    """The whole output is a number from 0 to 10, or the first `Answer:` with an integer behind it; the text is compared,
    so `03` is not `3`."""
    text = output.strip()
    if not re.fullmatch(r"[0-9]|10", text):
        marked = re.search(r"Answer:\s*(-?\d+)", output)
        if marked is None:
            return NO_ANSWER
        text = marked[1]
    return verdict(text, text, text == question["answer"].strip())


def mathvista(output: str, question: dict) -> Grade:
    """Multiple choice, numbers or words; numbers are rounded to the question's `precision` decimals, as MathVista does.

    Its owners and MMMU's let GPT-4 or a set of patterns find the answer in an output; those extractors are not imitated,
    so there are no released rules.
    """
    if question.get("choices"):
        return choice(output, question)
    text, gold = final_answer(output), question["answer"]
    gold_value = _rounded(gold, question)
    if text is None:
        return NO_ANSWER
    value = _rounded(text, question)
    if value is None or gold_value is None:
        return verdict(text, words_key(text), gold_value is None and words_key(text) == words_key(gold))
    return verdict(text, number_key(value), value == gold_value)


def _rounded(text: str, question: dict) -> Fraction | None:
    """The number, rounded where the question states a precision; a unit of the question may stand behind it."""
    value = read_number(without_unit(text, str(question.get("unit") or "").strip()))
    precision = question.get("precision")
    if precision in (None, ""):
        return value
    try:
        decimals = int(float(precision))
    except (TypeError, ValueError, OverflowError):
        decimals = -1
    if not 0 <= decimals <= MOST_DECIMALS:
        raise UserError(
            f"question {question.get('id')!r}: `precision` is {short(precision)}, expected 0 to {MOST_DECIMALS}."
        )
    return None if value is None else round(value, decimals)


def tabmwp(output: str, question: dict) -> Grade:
    """Multiple choice, or a value rounded to three places, or words; the question's unit may stand behind a number."""
    if question.get("choices"):
        return choice(output, question)
    text = final_answer(output)
    if text is None:
        return NO_ANSWER
    key, gold = (_tabmwp_key(part, question.get("unit") or "") for part in (text, question["answer"]))
    return verdict(text, key, key == gold)


def _tabmwp_key(text: str, unit: str) -> str:
    text = without_unit(text, unit)
    value = read_number(text.rsplit("=", 1)[-1])  # of an equation, its right side
    return words_key(text) if value is None else number_key(round(value, TABMWP_DECIMALS))


def tabmwp_released(output: str, question: dict) -> Grade:
    """PromptPG's official rule, extended by an `Answer:` pattern: ordered patterns over the whole output, letters A to F;
    for multiple choice the most similar option when no letter is found. Where it draws an option at random (a letter beyond
    the options) the first one is taken here, so that the grade of an output never changes."""
    unit, choices, gold = question.get("unit") or "", question.get("choices"), question["answer"]
    if (
        choices and gold not in choices
    ):  # TabMWP's own files have the option's text, for which a row may have the letter
        gold = str(choices[LETTERS.index(gold_letter(question))])
    text = _released_prediction(output, choices)
    key = _released_normal(text, unit).lower()
    return verdict(text, key, key == _released_normal(gold, unit).lower())


def _released_prediction(output: str, choices: list | None) -> str:
    output = _RELEASED_FRACTION.sub(r"\1/\2", output)
    output = re.sub(r"(?<![AP]\.M)\.$", "", output)
    output = re.sub(r"(?<=\d)=(?=[-$\d])", " = ", output).replace("\u2212", "-")
    if choices:
        options = [str(option) for option in choices]
        for pattern in _CHOICE_PATTERNS:
            letters = re.findall(pattern, output)
            place = _RELEASED_LETTERS.find(letters[0].upper()) if letters else -1
            if place >= 0:  # another letter leaves it to the next pattern
                return options[place if place < len(options) else 0]
        return max(options, key=lambda option: _overlap(option, output))
    for pattern in _FREE_PATTERNS:
        if matches := re.findall(pattern, output):
            last = matches[-1].strip()
            return last[:-1] if last.endswith(".") and ".M." not in last else last
    # the last pattern is _PIECE alone; a search for it would read a long run of signs once for each of them
    for run in reversed(_RUN.findall(output)):
        if piece := run.rstrip("-$.,/:"):
            return piece
    return output


def _overlap(option: str, output: str) -> float:
    """Shared words over the words of the longer text; 2 for equal texts."""
    if option == output:
        return 2.0
    words, others = option.split(" "), output.split(" ")
    return (
        len(set(words) & set(others)) / max(len(words), len(others))
        if len(words) > 1 or len(others) > 1
        else 0.0
    )


def _released_normal(text: str, unit: str) -> str:
    text = re.sub(r"[,./]$", "", re.sub(r"^\$", "", text))
    if not re.match(r"[-+]?[\d,./]+$", text):
        return text.replace(unit, "").strip() if unit else text
    try:
        bare = text.replace(",", "")
        if re.match(r"[-+]?\d+$", bare):
            return str(int(bare))
        if "/" in bare:
            numerator, denominator = bare.split("/")[:2]
            number = round(float(numerator) / float(denominator), TABMWP_DECIMALS)
        else:
            number = round(float(bare), TABMWP_DECIMALS)
    except (ValueError, ZeroDivisionError):
        return "0"  # as released
    return re.sub(r"\.0+$", "", str(number))
