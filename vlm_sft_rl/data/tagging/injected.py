"""Find the injected error (ViCrit, arXiv 2506.10128): from tagged rows to questions that ask for the wrong phrase.

A negative stops behind its wrong phrase, which would then be the last one always; its positive says how the text goes on.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from ...errors import FORMAT, TAGS, RowError, UserError, in_words
from ...io import rows_file
from ..rows import read_rows
from ..tags import Span, TagError, Text, parse, strip_tags

QUESTION = 'One phrase of this text is not true of the image: "{text}" Which phrase is it?'
FEWEST = 2  # phrases of a text; with one there is nothing to find
_PART = re.compile(r"(.*)-(pos|neg\d+)")  # of an id


def injected_questions(
    rows: Iterable[dict], question: str = QUESTION, notes: Counter | None = None
) -> Iterator[dict]:
    """For each negative and its positive: the positive's text with the negative's wrong phrase in its place, as a question
    whose answer is that phrase.

    Args:
        rows: tagged rows, each negative (`X-neg0`) somewhere behind its positive (`X-pos`).
        question: holds `{text}`.
        notes: counts the negatives left out, by reason.

    Yields:
        Question rows with the negative's id and images.

    Raises RowError: tags that do not pair up, or a negative that does not begin as its positive does.
    """
    notes = Counter() if notes is None else notes
    name, positive = None, None
    for row in rows:
        match = _PART.fullmatch(row["id"])
        if match is None:
            notes["rows that are no positive or negative of `data tag` or `data synthetic`"] += 1
        elif match[2] == "pos":
            name, positive = match[1], row
        elif match[1] != name:
            notes["negatives without their positive before them"] += 1
        elif (built := _injected(positive, row)) is None:
            notes[f"negatives of texts with fewer than {FEWEST} phrases"] += 1
        else:
            text, phrase = built
            yield {
                "id": row["id"],
                "images": row["images"],
                "question": question.replace("{text}", text),
                "answer": phrase,
            }


def _injected(positive: dict, negative: dict) -> tuple[str, str] | None:
    """The text with the wrong phrase in it, and the phrase; of the first answer that has one and enough phrases.

    Raises RowError: tags that do not pair up, or a negative that does not begin as its positive does.
    """
    for right, wrong in zip(positive["messages"], negative["messages"], strict=False):
        pieces = _pieces(wrong, negative) if wrong["role"] == "assistant" else []
        if not pieces or not isinstance(pieces[-1], Span) or pieces[-1].confident:
            continue
        start, phrase = pieces[-1].start, pieces[-1].phrase
        ends = {piece.start: piece.end for piece in _pieces(right, positive) if isinstance(piece, Span)}
        if start not in ends or right["content"][:start] != wrong["content"][:start]:
            raise RowError(
                FORMAT,
                f"up to its wrong phrase {phrase!r} it is not the text of {positive['id']!r}. Give the rows as `data tag` "
                "or `data synthetic` wrote them.",
                negative["source"],
            )
        if len(ends) >= FEWEST:
            return strip_tags(wrong["content"] + right["content"][ends[start] :]).strip(), phrase
    return None


def _pieces(message: dict, row: dict) -> list[Text | Span]:
    try:
        return parse(message["content"])
    except TagError as error:
        raise RowError(TAGS, str(error), row["source"]) from error


def write_injected(source: str | Path, target: str | Path, question: str = QUESTION) -> dict[str, int]:
    """Tagged rows -> question rows (see `injected_questions`). Returns counts: "questions", and what was left out and why.

    Raises UserError: `question` has no `{text}`, a row of unknown schema or as in `injected_questions`, or no question could
    be made.
    """
    if "{text}" not in question:
        raise UserError(f"The question {question!r} has no {{text}} in it.")
    notes: Counter = Counter()
    count = 0
    with rows_file(target) as write:
        for row in injected_questions(read_rows(source), question, notes):
            write(row)
            count += 1
        if not count:
            why = in_words(notes) or "it is empty"
            raise UserError(
                f"{source}: no question could be made ({why}). Give it the rows of `data synthetic` or `data tag`."
            )
    return {"questions": count, **notes}
