"""What corrections are built from: question files, or conversations with staged answers (LLaVA-CoT-100k)."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

from ..data.rows import IMAGE, read_raw, read_rows
from ..data.stages import conclusion
from ..errors import UserError
from ..graders import Grader
from ..self_training.pool import read_questions


def read_source(
    path: str | Path, image_root: str | Path | None, grader: Grader | None, counts: Counter | None = None
) -> list[dict]:
    """Questions with `answer`, and with `staged` where the file has staged answers.

    Conversations give one question for every pair of turns (the released pipeline takes the first pair alone); the
    conclusion of a staged answer is the question's `answer`. Pairs without a conclusion are left out and counted.

    Raises:
        UserError: as `read_questions`, or no staged answer in a file of conversations.
    """
    _, first = next(read_raw(path), (0, {}))
    if not ("conversations" in first or "messages" in first):
        return read_questions(path, image_root, grader)
    counts = Counter() if counts is None else counts
    questions = []
    for number, row in enumerate(read_rows(path), 1):
        pairs = [
            p for p in pairwise(row["messages"]) if (p[0]["role"], p[1]["role"]) == ("user", "assistant")
        ]
        for k, (asked, told) in enumerate(pairs):
            said = conclusion(told["content"])
            if said is None:
                counts["pairs without a conclusion"] += 1
                continue
            text = asked["content"].replace(IMAGE, "").strip()
            questions.append(
                {
                    # ids of the published set have slashes; the row's number names it as well
                    "id": f"{number}-{k}",
                    "source_id": row["id"],
                    "images": row["images"],
                    "question": text,
                    "answer": said,
                    "staged": told["content"].strip(),
                }
            )
    if not questions:
        raise UserError(
            f"{path}: no answer in it has a <CONCLUSION>. Give LLaVA-CoT rows, or a question file."
        )
    return questions
