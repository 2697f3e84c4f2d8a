"""Multiple choice, GeoQA among it: the gold answer is an option's letter or its text."""

import hashlib
import re

from ..data.rows import letter_said, option_texts
from ..errors import UserError, short
from .grade import NO_ANSWER, Grade, verdict
from .text import final_answer, read_number, words_key

LETTERS = "ABCDEFGHIJ"
_LETTER = re.compile(r"(?:option\s+|choice\s+)?[(\[]?([A-Ja-j])[)\].:]?(?:\s+(.*))?", re.IGNORECASE)
_FREE_CREDIT = 0.75


def options_of(question: dict) -> list[str]:
    """The options' texts, without the letters some files write before them.

    Raises UserError: `choices` is missing or no list of 2 to 10 texts.
    """
    choices = question.get("choices")
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise UserError(
            f"question {question.get('id')!r}: `choices` must be a list of 2 to {len(LETTERS)} options, found "
            f"{short(choices)}."
        )
    return option_texts(map(str, choices))


def gold_letter(question: dict) -> str:
    """The letter of the gold answer.

    Raises UserError: the answer is neither a letter of an option nor an option's text.
    """
    options, answer = options_of(question), question["answer"].strip()
    if letter := letter_said(answer, len(options)):
        return letter
    texts = [words_key(option) for option in options]
    if words_key(answer) in texts:
        return LETTERS[texts.index(words_key(answer))]
    letter = answer.strip("(). ").upper()
    if len(letter) == 1 and letter in LETTERS[: len(options)]:
        return letter
    raise UserError(
        f"question {question.get('id')!r}: the answer {answer!r} is neither a letter up to "
        f"{LETTERS[len(options) - 1]} nor one of the options {options}."
    )


def read_choice(text: str, options: list[str]) -> str | None:
    """The letter that a marked answer means; None when it names none of the options, or two different ones."""
    if letter := letter_said(text, len(options)):
        return letter
    texts = [words_key(option) for option in options]
    if texts.count(words_key(text)) == 1:
        return LETTERS[texts.index(words_key(text))]
    if len({letter.upper() for letter in re.findall(r"[(\[]([A-Ja-j])[)\]]", text)}) > 1:
        return None
    if match := _LETTER.fullmatch(text.strip()):
        letter, rest = match[1].upper(), match[2]
        if letter not in LETTERS[: len(options)]:
            return None
        named = [LETTERS[i] for i, t in enumerate(texts) if rest and t == words_key(rest)]
        # "A cat": an article, not a letter, unless the option follows or the letter is set off
        if not rest or letter in named or (not named and re.match(r"\W*[A-Ja-j][).\]:]", text.strip())):
            return letter
        return None
    value = read_number(text)
    same = [LETTERS[i] for i, o in enumerate(options) if value is not None and read_number(o) == value]
    return same[0] if len(same) == 1 else None


def choice(output: str, question: dict) -> Grade:
    """The option that the final answer names."""
    gold, options = gold_letter(question), options_of(question)
    text = final_answer(output)
    letter = None if text is None else read_choice(text, options)
    return NO_ANSWER if letter is None else verdict(text, letter, letter == gold)


def choice_released(output: str, question: dict) -> Grade:
    """The program of the Qwen2-VL repository that evaluates GeoQA (and M3CoT): the text behind the last lower-case "answer",
    of an output without that word all of it; in this tail the last `(X)`, else the last letter whatever it belongs to, else
    the last option that is named, else the gold answer in three of four cases. There that rule tosses a coin; here the
    output's digest decides, so that the share is the same and the grade of an output never changes."""
    letter = _released_letter(output.split("answer")[-1], options_of(question))
    gold = gold_letter(question)
    if letter is None:
        digest = hashlib.sha256(output.encode("utf-8", "surrogatepass")).hexdigest()
        letter = gold if int(digest, 16) % 100 < 100 * _FREE_CREDIT else None
    return NO_ANSWER if letter is None else verdict(letter, letter, letter == gold)


def choice_building(output: str, question: dict) -> Grade:
    """The program of the same repository that builds the training rows: as `choice_released`, but behind the last "Answer",
    capitalised, and nothing is given away."""
    letter = _released_letter(output.split("Answer")[-1], options_of(question))
    return NO_ANSWER if letter is None else verdict(letter, letter, letter == gold_letter(question))


def _released_letter(tail: str, options: list[str]) -> str | None:
    letters = re.findall(r"\(([A-Za-z])\)", tail) or re.findall("[A-Za-z]", tail)
    if letters:
        return letters[-1].upper()
    # a letter that stands alone, which both programs look for at last, would have been found above
    tail, pairs = tail.lower(), zip(LETTERS, options, strict=False)
    named = [letter for letter, option in pairs if option.lower() in tail]
    return named[-1] if named else None
