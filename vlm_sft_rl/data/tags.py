"""The grammar of verification tags: `<SPAN> grounded </CN>` and `<SPAN> hallucinated </UN>`.

Pure text, no tokenizer. The three strings are those of REVERSE (arXiv 2504.13169); the spacing is our
canonical form: one space on each side of the phrase inside the tags, a space between running text and
`<SPAN>`, punctuation directly after the closing tag.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from ..errors import UserError

OPEN = "<SPAN>"
CONFIDENT = "</CN>"
UNCONFIDENT = "</UN>"
ANSWERS = (
    "messages",
    "conversations",
    "completion",
    "answer",
)  # fields of SFT rows that hold what is learned
ROWS_LOOKED_AT = 2000  # for the share of rows with tags
VERIFICATION_TOKENS = (OPEN, CONFIDENT, UNCONFIDENT)
# what becomes of an answer whose phrases are verified while it is written
VERIFIED, NOT_VERIFIED, NO_PHRASE = "every phrase verified", "not fully verified", "nothing to verify"

_TAG = re.compile("|".join(map(re.escape, VERIFICATION_TOKENS)))
_BLANKS = " \t"
# `</CN> .` as some data sets write it; a following digit or letter means that the mark belongs to the next
# word (".5")
_DETACHED_PUNCTUATION = re.compile(r"[ \t]+(?=[.,;:!?]+(?:\s|$))")


_ARTICLES = (["a"], ["an"], ["the"])
_MARKS = ".,;:!?\"'()[]…。，、！？“”‘’"
LOW_SHARE = 0.05  # of answers with tags in a set that is to teach verdicts


class TagError(UserError):
    """Tags that do not pair up. `position` is the character offset of the first offender."""

    def __init__(self, message: str, position: int):
        super().__init__(message)
        self.message = message
        self.position = position

    def __reduce__(self):
        return TagError, (self.message, self.position)


@dataclass(frozen=True)
class Text:
    """Running text outside of tags, exactly as written; `start` is its character offset."""

    text: str
    start: int = 0


@dataclass(frozen=True)
class Span:
    """A tagged phrase without its tags and padding; `start` and `end` include the tags."""

    phrase: str
    confident: bool
    start: int = 0
    end: int = 0


def format_span(phrase: str, confident: bool) -> str:
    """`a kettle` -> `<SPAN> a kettle </CN>` (or `</UN>`).

    Raises TagError: the phrase is empty or contains a tag itself.
    """
    inner = phrase.strip()
    if not inner:
        raise TagError("A phrase to be tagged is empty. Give it at least one word.", 0)
    if match := _TAG.search(inner):
        raise TagError(
            f"The phrase {inner!r} contains the tag {match.group()}: tags do not nest.", match.start()
        )
    return f"{OPEN} {inner} {CONFIDENT if confident else UNCONFIDENT}"


def parse(text: str) -> list[Text | Span]:
    """Split tagged text into running text and phrases.

    Raises TagError: a tag is opened twice, closed without being open, never closed, or encloses nothing.
    """
    pieces: list[Text | Span] = []
    opened, cursor = None, 0
    for match in _TAG.finditer(text):
        at, tag = match.start(), match.group()
        if tag == OPEN:
            if opened is not None:
                raise TagError(
                    f"{OPEN} at character {at} while the one at {opened} is still open: tags do not nest. "
                    f"Close the first with {CONFIDENT} or {UNCONFIDENT}.",
                    at,
                )
            if at > cursor:
                pieces.append(Text(text[cursor:at], cursor))
            opened = at
        else:
            if opened is None:
                raise TagError(f"{tag} at character {at} closes nothing. Put {OPEN} before the phrase.", at)
            phrase = text[opened + len(OPEN) : at].strip()
            if not phrase:
                raise TagError(f"The tags at character {opened} enclose no phrase. Remove them.", opened)
            pieces.append(Span(phrase, tag == CONFIDENT, opened, match.end()))
            opened, cursor = None, match.end()
    if opened is not None:
        raise TagError(
            f"{OPEN} at character {opened} is never closed. Add {CONFIDENT} or {UNCONFIDENT}.", opened
        )
    if cursor < len(text):
        pieces.append(Text(text[cursor:], cursor))
    return pieces


def spans(text: str) -> list[Span]:
    """The tagged phrases in order. Raises TagError where `parse` would."""
    return [piece for piece in parse(text) if isinstance(piece, Span)]


class TagCounts(NamedTuple):
    """Answers, those of them with a tag, and those with each of the closing tags."""

    answers: int
    tagged: int
    confident: int
    unconfident: int


def tag_shortage(counts: TagCounts) -> str | None:
    """What to say of training verdicts on these answers; None where their tags are enough."""
    answers, tagged = counts.answers, counts.tagged
    if not tagged:
        return (
            f"none of the {answers} answers has verification tags ({OPEN} … {CONFIDENT}), so no verdict can be learnt. "
            "Tag them with `vlm-sft-rl data tag`."
        )
    if tagged < LOW_SHARE * answers:
        return f"only {tagged} of {answers} answers ({100 * tagged / answers:.2g} %) have verification tags"
    for tag, count in ((CONFIDENT, counts.confident), (UNCONFIDENT, counts.unconfident)):
        if not count:
            return (
                f"none of {tagged} tagged answers has {tag}, so the other verdict is learnt for every phrase"
            )
    return None


def tag_ranges(text: str, ranges: Iterable[tuple[int, int, bool]]) -> str:
    """Put tags round character ranges `(start, end, confident)` of plain text.

    `strip_tags` gives the text back when the ranges begin and end at word boundaries.

    Raises TagError: ranges overlap, are empty, or the text has tags already.
    """
    if match := _TAG.search(text):
        raise TagError(f"The text already has a tag at character {match.start()}.", match.start())
    out, cursor = [], 0
    for start, end, confident in sorted(ranges):
        if start < cursor:
            raise TagError(f"The range {start}..{end} overlaps the one before it.", start)
        out += [text[cursor:start], format_span(text[start:end], confident)]
        cursor = end
    return "".join(out) + text[cursor:]


def verification(ok: bool, phrases: int) -> str:
    """One of `VERIFIED`, `NOT_VERIFIED` and `NO_PHRASE`: an answer without a phrase was not verified by anything.

    Args:
        ok: nothing in the answer was left unverified.
        phrases: how many of its phrases were.
    """
    if not ok:
        return NOT_VERIFIED
    return VERIFIED if phrases else NO_PHRASE


def normalized(phrase: str) -> str:
    """What two phrases must share to name the same: their words without case, marks around them and an article in front."""
    words = [word.strip(_MARKS) for word in phrase.casefold().split()]
    words = [word for word in words if word]
    return " ".join(words[1:] if words[:1] in _ARTICLES and words[1:] else words)


def strip_tags(text: str) -> str:
    """Remove the tags and the spaces that came with them; all other text is left as it is.

    Takes unbalanced text too (an answer that was cut short is still readable).
    """
    out, cursor = "", 0
    for match in _TAG.finditer(text):
        out += text[cursor : match.start()]
        cursor = match.end()
        if match.group() == OPEN:
            while cursor < len(text) and text[cursor] in _BLANKS:
                cursor += 1
            out += _gap(out, text[cursor:])
        else:
            out = out.rstrip(_BLANKS)
            if detached := _DETACHED_PUNCTUATION.match(text, cursor):
                cursor = detached.end()
            else:
                out += _gap(out, text[cursor:])
    return out + text[cursor:]


def phrase_ranges(text: str) -> list[tuple[int, int]]:
    """Where each tagged phrase stands in `strip_tags(text).strip()`, as character offsets; unbalanced text too."""
    ranges, opened = [], None
    for match in _TAG.finditer(text):
        if match.group() == OPEN:
            opened = match.end()
        elif opened is not None:
            phrase = strip_tags(text[opened : match.start()]).strip()
            before = strip_tags(text[: match.end()]).lstrip()
            # line breaks before the tag stay in the text, and are no part of the phrase
            end = len(before.rstrip() if phrase else before)
            ranges.append((end - len(phrase), end))
            opened = None
    return ranges


def _gap(before: str, after: str) -> str:
    """A space where removing a tag would glue two words together (`cat </CN>and`), else nothing."""
    if not before or not after or _TAG.match(after):
        return ""
    left = before[-1].isalnum() or before[-1] in ".,;:!?)"
    return " " if left and after[0].isalnum() else ""


def count_tagged(rows: Any) -> TagCounts:
    """Counts of training rows of any schema, without answers of weight 0.

    Looked at are up to `ROWS_LOOKED_AT` rows, spread over all; where those lack a closing tag, all. Of a stream the first
    ones.
    """
    if not hasattr(rows, "__len__"):
        return _count(islice(rows, ROWS_LOOKED_AT))
    if hasattr(rows, "select_columns"):  # pictures stay closed
        rows = rows.select_columns([name for name in ANSWERS if name in rows.column_names])
    step = max(1, len(rows) // ROWS_LOOKED_AT)
    counts = _count(rows[i] for i in range(0, len(rows), step))
    if (counts.confident and counts.unconfident) or step == 1:
        return counts
    if hasattr(rows, "iter"):  # in batches a data set is read in a seventh of the time
        batches = rows.iter(1000)
        return _count(
            dict(zip(b, row, strict=True)) for b in batches for row in zip(*b.values(), strict=True)
        )
    return _count(rows[i] for i in range(len(rows)))


def _count(rows: Iterable[dict]) -> TagCounts:
    flags = [(CONFIDENT in text, UNCONFIDENT in text) for raw in rows for text in _answers(raw)]
    confident, unconfident = (sum(each) for each in zip(*flags, strict=True)) if flags else (0, 0)
    return TagCounts(len(flags), sum(map(any, flags)), confident, unconfident)


def _answers(raw: dict) -> Iterator[str]:
    for turns in filter(None, (raw.get(name) for name in ANSWERS)):
        for turn in turns if isinstance(turns, list) else [{"role": "assistant", "content": turns}]:
            learnt = isinstance(turn, dict) and turn.get("weight") != 0
            if learnt and (turn.get("role") or turn.get("from")) in ("assistant", "gpt"):
                yield str(turn.get("content") or turn.get("value"))
