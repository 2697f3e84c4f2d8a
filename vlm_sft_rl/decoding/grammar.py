"""What the decoding algorithms must know about a tokenizer. No torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

SENTENCE_ENDS = (".", "!", "?", "\n", "。", "！", "？")
HINT = "(Hint: potential incorrect phrases -> {})"
FALSE_PREMISE_SENTENCE = (
    "For this question, please point out the false premises or note what information is missing, "
    "rather than answering it directly."
)
CANNED_ANSWER = "Unable to answer directly due to false premises or missing information."


@dataclass(frozen=True)
class Grammar:
    """Token ids of the verification tags and of the end, and two views of the text.

    Attributes:
        open, confident, unconfident: ids of <SPAN>, </CN>, </UN>; None in a model without verification tokens.
        ends: ids that end an answer.
        decode: ids -> text, tags kept, other special tokens dropped.
        piece: id -> the text of one token, leading space kept.
        plain: ids -> text without tags.
    """

    open: int | None
    confident: int | None
    unconfident: int | None
    ends: frozenset[int]
    decode: Callable[[Sequence[int]], str]
    piece: Callable[[int], str]
    plain: Callable[[Sequence[int]], str]

    @cached_property
    def closes(self) -> frozenset[int]:
        return frozenset(i for i in (self.confident, self.unconfident) if i is not None)

    @cached_property
    def watched(self) -> frozenset[int]:
        """Ids that an algorithm must see; all others only make the answer longer."""
        return self.closes | self.ends | ({self.open} if self.open is not None else frozenset())

    def phrase(self, ids: Sequence[int]) -> str:
        return self.decode(ids).strip()

    def sentence_ends(self, ids: Sequence[int]) -> list[int]:
        """Lengths n such that ids[:n] ends with a sentence and no span is open there.

        A dot inside a number or an abbreviation ("3.5", "U.S.") does not count: what follows must begin with
        white space, be a tag, or be the end.
        """
        found, inside = [], False
        for i, token in enumerate(ids):
            if token in self.closes or token == self.open:
                inside = token == self.open
                continue
            text = self.piece(token)
            if inside or not text.rstrip(" ").endswith(SENTENCE_ENDS):
                continue
            last = i + 1 == len(ids) or ids[i + 1] in self.watched
            if last or text[-1:].isspace() or self.piece(ids[i + 1])[:1].isspace():
                found.append(i + 1)
        return found


def hint_text(phrases: Sequence[str], *, limit: int = 5) -> str:
    """The rewritten query's addition (REVERSE section 3.3), with the `limit` last phrases; empty without phrases."""
    return HINT.format(", ".join(phrases[-limit:])) if phrases else ""
