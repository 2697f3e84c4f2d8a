"""Query-rewriting augmentation: some questions are asked again with a list of phrases to avoid.

REVERSE (arXiv 2504.13169, section 3) rewrites the query this way when it resamples, and trains on it with
probability 0.2; the wording is that of its released code.
"""

import random

from .rows import IMAGE

GENERAL_ANSWER = "general_answer"
HINT = " (Hint: potential incorrect phrases -> {})"


def add_hints(row: dict, probability: float, seed: int = 0) -> dict:
    """A copy of `row` in which questions whose answer is a general one with a hint are, at random, rewritten.

    The draw depends on `(seed, row id, turn)` alone: not on the epoch, the batch or the number of workers.
    """
    if probability <= 0:
        return row
    messages = list(row["messages"])
    for i in range(1, len(messages)):
        question, answer = messages[i - 1], messages[i]
        if question["role"] != "user" or answer["role"] != "assistant":
            continue
        if answer.get("answer_type") != GENERAL_ANSWER or not answer.get("hint"):
            continue
        if random.Random(f"{seed}/{row['id']}/{i}").random() < probability:
            messages[i - 1] = {**question, "content": append_hint(question["content"], answer["hint"])}
    return {**row, "messages": messages}


def append_hint(question: str, hint: str) -> str:
    """Put the hint after the words of the question, and before images that close it."""
    words = question
    while words.rstrip().endswith(IMAGE):
        words = words.rstrip().removesuffix(IMAGE)
    words = words.rstrip() if len(words) < len(question) else words
    return words + HINT.format(hint.lower()) + question[len(words) :]
