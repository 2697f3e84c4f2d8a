"""Where an answer goes wrong: give the model the true stages one by one, and see from which on it is right.

A question that is answered right once the caption is given was misread from the image; one that needs the reasoning too was
misread in thought; one that fails even then fails in its conclusion.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from fractions import Fraction

import numpy as np

from ..data.rows import question_text
from ..data.stages import SEPARATOR, STAGES, format_stage, parse
from ..errors import UserError
from ..evaluation.bootstrap import bootstrap
from ..graders import Grader
from ..graders.grade import grade_staged

GIVEN = ("nothing", "SUMMARY", "CAPTION", "REASONING")
TYPES = ("right", "unreadable", "plan", "perception", "reasoning", "arithmetic", "conclusion")
_NUMBER = r"[-+]?\d+(?:\.\d+)?"
_SUM = re.compile(
    rf"({_NUMBER})\s*(\+|-|\*|×|/|÷|plus|minus|times|divided by)\s*({_NUMBER})\s*(?:=|equals|is)\s*({_NUMBER})",
    re.IGNORECASE,
)
_OPERATIONS = {
    **dict.fromkeys(("+", "plus"), lambda a, b: a + b),
    **dict.fromkeys(("-", "minus"), lambda a, b: a - b),
    **dict.fromkeys(("*", "×", "times"), lambda a, b: a * b),
    **dict.fromkeys(("/", "÷", "divided by"), lambda a, b: a / b if b else None),
}


def gold_prefix(staged: str, given: str) -> str:
    """The true answer up to and with the stage `given`; empty for `nothing`. Raises StageError: it is not staged."""
    if given == "nothing":
        return ""
    stages = parse(staged)
    kept = STAGES[: STAGES.index(given) + 1]
    return SEPARATOR.join(format_stage(stage, stages.get(stage)) for stage in kept)


def false_sums(text: str) -> list[str]:
    """The equations of two numbers in a text that do not hold, as written."""
    wrong = []
    for match in _SUM.finditer(text):
        value = _OPERATIONS[match[2].lower()](Fraction(match[1]), Fraction(match[3]))
        if value != Fraction(match[4]):
            wrong.append(match[0])
    return wrong


def error_type(statuses: Mapping[str, str], texts: Mapping[str, str]) -> str:
    """What went wrong with one question.

    Args:
        statuses, texts: per entry of GIVEN the grade (`right`, `wrong`, `unreadable`) and the whole answer.
    """
    if statuses["nothing"] == "right":
        return "right"
    if statuses["nothing"] == "unreadable":
        return "unreadable"
    if statuses["SUMMARY"] == "right":
        return "plan"
    if statuses["CAPTION"] == "right":
        return "perception"
    if statuses["REASONING"] == "right":
        return "arithmetic" if false_sums(texts["CAPTION"]) else "reasoning"
    return "conclusion"


def swap_stages(
    model,
    processor,
    questions: Sequence[dict],
    grader: Grader,
    *,
    images: Sequence,
    max_new_tokens: int = 512,
    batch_size: int = 16,
) -> list[dict]:
    """Answer every question with nothing given and with each beginning of the true answer; greedy.

    Returns:
        per question `{"id", "type", "statuses", "texts"}`.

    Raises UserError: a question without a staged answer in `staged`.
    """
    from ..decoding import SamplingConfig, sample_many

    for question in questions:
        if not isinstance(question.get("staged"), str):
            raise UserError(f"question {question['id']!r}: `staged` must hold its true staged answer.")
    texts: dict[str, list[str]] = {}
    for given in GIVEN:
        prefixes = [gold_prefix(q["staged"], given) for q in questions]
        groups = sample_many(
            model,
            processor,
            list(images),
            [question_text(q) for q in questions],
            1,
            SamplingConfig(max_new_tokens=max_new_tokens),
            ids=[q["id"] for q in questions],
            batch_size=batch_size,
            prefixes=prefixes,
        )
        texts[given] = [
            f"{prefix}{SEPARATOR if prefix else ''}{group[0].text}"
            for prefix, group in zip(prefixes, groups, strict=True)
        ]
    errors = []
    for k, question in enumerate(questions):
        answers = {given: texts[given][k] for given in GIVEN}
        statuses = {given: grade_staged(grader, text, question).status for given, text in answers.items()}
        errors.append(
            {
                "id": question["id"],
                "type": error_type(statuses, answers),
                "statuses": statuses,
                "texts": answers,
            }
        )
    return errors


def error_figures(errors: Sequence[dict], rounds: int = 1000, seed: int = 0) -> dict:
    """Shares of each type, and accuracy with each beginning given, with 95 % bootstrap intervals over questions."""

    def shares(columns: Sequence[str], value) -> dict:
        rows = np.array([[*[float(value(f) == c) for c in columns], 1.0] for f in errors])
        return {
            c: {
                k: v
                for k, v in asdict(
                    bootstrap(rows, lambda t, i=i: t[..., i] / t[..., -1], rounds, seed)
                ).items()
                if k != "n"
            }
            for i, c in enumerate(columns)
        }

    given = {g: shares(["right"], lambda f, g=g: f["statuses"][g])["right"] for g in GIVEN}
    return {"types": shares(TYPES, lambda f: f["type"]), "given": given, "n": len(errors)}
