"""The conclusion of an answer: what stands behind the thinking, inside of the wrapper that opens last. Pure text, no
model's format is known by name; every reading is linear in the text's length.

Read are `<think>…</think>` (also without its opening or its closing tag), the stage `<CONCLUSION>`, `<answer>…</answer>`,
`\\boxed{…}` with nested braces, and the box tokens of GLM. A line "Answer: B" is no wrapper: how it is read is a rule of
the graders.
"""

import re
from itertools import pairwise
from typing import NamedTuple

from .stages import final_block

_THINKING = re.compile(r"<\s*(/\s*)?(?:think|thinking|thought)\s*>|◁\s*(/\s*)?think\s*▷", re.IGNORECASE)
_ANSWER = re.compile(r"<\s*(/\s*)?answer\s*>|<\|(?:begin|(end))_of_box\|>", re.IGNORECASE)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_TEX_WORDS = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}")
# what TeX writes around a plain answer -> the plain answer
_TEX = (
    (re.compile(r"^\s*(?:\${1,2}|\\[(\[])([^$]*?)(?:\${1,2}|\\[)\]])\s*$"), r"\1"),  # $B$, \(B\)
    (re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})"), "°"),
    (re.compile(r"\{,\}|,\\!"), ","),
    (re.compile(r"\\[,;:! ]|~"), " "),
    (re.compile(r"\\([%$#&_{}])"), r"\1"),
    (re.compile(r"\\(?:left|right)(?![A-Za-z])"), ""),
)


class Conclusion(NamedTuple):
    """What an answer says at last.

    Attributes:
        text: without thinking and without the wrapper; the whole answer, as it is, where there is neither.
        marked: whether a wrapper says that this is the final answer and nothing else.
    """

    text: str
    marked: bool


def without_thinking(text: str) -> str:
    """The last piece outside of thinking that is not blank: neither behind an opening tag nor before a closing one. The text
    as it is where nothing is marked as thinking; empty where all of it is."""
    tags = list(_THINKING.finditer(text))
    if not tags:
        return text
    for before, behind in reversed(list(pairwise([None, *tags, None]))):
        opened = before is not None and not _closes(before)
        closed = behind is not None and _closes(behind)
        piece = text[before.end() if before else 0 : behind.start() if behind else len(text)].strip()
        if piece and not opened and not closed:
            return piece
    return ""


def _closes(tag: re.Match) -> bool:
    return bool(tag[1] or tag[2])


def conclusion(answer: str) -> Conclusion:
    """The conclusion of an answer. The last one counts, also one that is cut off; a thought that is never closed and an
    empty wrapper conclude nothing (`text` is empty)."""
    text = without_thinking(answer)
    parts = [part for part in (final_block(text, "CONCLUSION"), _tagged(text), _boxed(text)) if part]
    if not parts:
        return Conclusion(text, False)
    return Conclusion(max(parts, key=lambda part: (bool(part[1]), part[0]))[1], True)


def _tagged(text: str) -> tuple[int, str] | None:
    """Start and content of the last `<answer>`; a closing tag alone closes what stands before it."""
    tags = list(_ANSWER.finditer(text))
    for place in range(len(tags) - 1, -1, -1):
        if not _closes(tags[place]):
            end = tags[place + 1].start() if place + 1 < len(tags) else len(text)
            return tags[place].start(), text[tags[place].end() : end].strip()
    return (0, text[: tags[0].start()].strip()) if tags else None


def _boxed(text: str) -> tuple[int, str] | None:
    """Start and content of the last `\\boxed{…}`, without TeX; one that is never closed ends with its line."""
    openings = list(_BOXED.finditer(text))
    if not openings:
        return None
    depth, place, start = 1, openings[-1].start(), openings[-1].end()
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if not depth:
            return place, without_tex(text[start : brace.start()])
    return place, without_tex(text[start:].partition("\n")[0])


def folded(text: str) -> str:
    """A short answer as answers are compared: case, doubled blanks and periods at its ends do not count."""
    return " ".join(text.casefold().split()).strip(" .")


def without_tex(text: str) -> str:
    """A short text without what TeX writes around words and amounts; fractions stay."""
    for _ in range(3):  # \text{\textbf{B}}
        text = _TEX_WORDS.sub(r"\1", text)
    for pattern, plain in _TEX:
        text = pattern.sub(plain, text)
    return text.strip()
