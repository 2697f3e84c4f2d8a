"""Answers that look at answers, after R3V (arXiv 2411.00855): self-select and self-refine as searches. No torch.

What is asked is the caller's: `write(question, candidates)` makes the prompt that shows them.
"""

from collections.abc import Callable, Sequence

from ..data.tags import strip_tags
from .search import Ask, Draw, Search


def sample_candidates(question: str, n: int) -> Search:
    """N answers, and the first of them; choosing is left to whoever can read answers."""
    (drawn,) = yield [Draw("", n)]
    return drawn[0].text.strip()


def self_select(question: str, n: int, write: Callable[[str, Sequence[str]], str]) -> Search:
    """N answers in the order drawn, and greedily one more in view of them."""
    (drawn,) = yield [Draw("", n)]
    (chosen,) = yield [Ask(write(question, [_shown(c.text) for c in drawn]), whole=True)]
    return chosen.strip()


def self_refine(question: str, write: Callable[[str, str], str]) -> Search:
    """A greedy answer, and greedily another one in view of it."""
    (first,) = yield [Ask(question, whole=True)]
    (refined,) = yield [Ask(write(question, _shown(first)), whole=True)]
    return refined.strip()


def _shown(text: str) -> str:
    return strip_tags(text).strip()
