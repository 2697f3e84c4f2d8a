"""TabMWP: free answers (integers, decimals, fractions, text) and multiple choice.

`compat` is the released rule, which extends PromptPG's official one by an `Answer:` pattern: ordered patterns over the
whole output; for multiple choice the most similar option when no letter is found. Where it draws an option at random (a
letter beyond the options) the first one is taken here, so that the grade of an output never changes.
"""

import re

from . import choice
from .choice import LETTERS, gold_letter
from .grade import UNREADABLE, Grade, verdict
from .reading import final_answer, number_key, plain_number, read_number, words_key

DECIMALS = 3
_PIECE = r"[\-\d$.,/:]*\d"
_CHOICE_PATTERNS = (
    r"Answer: ([A-Za-z])\b",
    r"Answer: \(([A-Za-z])\)",
    r"^\(([A-Za-z])\)$",
    r"^([A-Za-z])$",
    r"^([A-Za-z])\. ",
    r"[Tt]he answer is ([A-Z])\b",
    r"^\(([A-Za-z])\) .+$",
    r"[Tt]he answer is \(([A-Za-z])\)",
)
_FREE_PATTERNS = (
    r"Answer: ([\s\S]+)$",
    r"[Tt]he answer is ([\s\S]+)$",
    r"[Tt]he table shows that ([\d$.,/:]+) ",
    r" = ([\d$.,/:]+)",
    rf"(?: be| is) ({_PIECE})",
    rf"(?: are| was) ({_PIECE})",
    rf"(?: were) ({_PIECE})",
    r" ([\d$.,/:]+ [AP]\.M\.)",
    rf"({_PIECE})",
)


def strict(output: str, question: dict) -> Grade:
    if question.get("choices"):
        return choice.strict(output, question)
    text = final_answer(output)
    if text is None:
        return UNREADABLE
    unit = question.get("unit") or ""
    key = _strict_key(text, unit)
    return verdict(text, key, key == _strict_key(question["answer"], unit))


def _strict_key(text: str, unit: str) -> str:
    """The value rounded to three places, or the words; the question's unit may stand behind a number."""
    if unit and text.casefold().rstrip(" .").endswith(unit.casefold()):
        shorter = text.rstrip(" .")[: -len(unit)].strip()
        text = shorter or text
    value = read_number(text.rsplit("=", 1)[-1])  # of an equation, its right side
    return words_key(text) if value is None else number_key(round(value, DECIMALS))


def compat(output: str, question: dict) -> Grade:
    unit = question.get("unit") or ""
    text = _released_prediction(output, question)
    key = _released_normal(text, unit)
    return verdict(text, key.lower(), key.lower() == _released_normal(_gold_text(question), unit).lower())


def _gold_text(question: dict) -> str:
    """The gold answer as TabMWP's own files have it: of a multiple choice the option's text, for which a row may have the
    letter."""
    answer, choices = question["answer"], question.get("choices")
    if not choices or answer in choices:
        return answer
    return str(choices[LETTERS.index(gold_letter(question))])


def _released_prediction(output: str, question: dict) -> str:
    output = plain_number(re.sub(r"\$(\\frac\{[^{}]*\}\{[^{}]*\})\$", r"\1", output))
    output = re.sub(r"(?<![AP]\.M)\.$", "", output)
    output = re.sub(r"(?<=\d)=(?=[-$\d])", " = ", output)
    if question.get("choices"):
        options = [str(choice) for choice in question["choices"]]
        for pattern in _CHOICE_PATTERNS:
            if found := re.findall(pattern, output):
                place = LETTERS.find(found[0].upper())
                if place >= 0:
                    return options[place if place < len(options) else 0]
        overlaps = [_overlap(option, output) for option in options]
        return options[overlaps.index(max(overlaps))]
    for pattern in _FREE_PATTERNS:
        if found := re.findall(pattern, output):
            last = found[-1].strip()
            return last[:-1] if last.endswith(".") and ".M." not in last else last
    return output


def _overlap(option: str, output: str) -> float:
    """Shared words over the words of the longer text; 2 for equal texts."""
    if option == output:
        return 2.0
    one, two = option.split(" "), output.split(" ")
    return len(set(one) & set(two)) / max(len(one), len(two)) if len(one) > 1 or len(two) > 1 else 0.0


def _released_normal(text: str, unit: str) -> str:
    text = re.sub(r"[,./]$", "", re.sub(r"^\$", "", text))
    if not re.fullmatch(r"[-+]?[\d,./]+", text):
        return text.replace(unit, "").strip() if unit else text
    try:
        bare = text.replace(",", "")
        if re.fullmatch(r"[-+]?\d+", bare):
            return str(int(bare))
        if "/" in bare:
            above, below = bare.split("/")[:2]
            number = round(float(above) / float(below), DECIMALS)
        else:
            number = round(float(bare), DECIMALS)
    except (ValueError, ZeroDivisionError):
        return "0"  # as released
    return re.sub(r"\.0+$", "", str(number))
