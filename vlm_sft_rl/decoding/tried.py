"""Which continuations of an answer were tried, and how much of each place's probability is still untried. No torch.

Sampling without replacement one draw at a time, as in UniqueRandomizer (Shi, Bieber and Sutton, arXiv 2002.09067): a trie
holds the continuations that were drawn, each step with its probability; every next token is scaled by the share of its
subtree that was not tried. So each draw has the law of the model given that it is none of the earlier ones. Stochastic
beam search (Kool, van Hoof and Welling, arXiv 1903.06059) draws by the same law side by side.
"""

import math
from collections.abc import Iterable, Mapping

NOTHING = 1e-6  # a smaller share is rounding of 16-bit logits, no continuation


class Step:
    """A token in its place: `probability` behind the tokens before it, and the `tried` share of what follows it. Less than
    the share `least` untried counts as nothing."""

    __slots__ = ("children", "least", "probability", "tried")

    def __init__(self):
        self.children: dict[int, Step] = {}
        self.probability = self.tried = 0.0
        self.least = NOTHING

    def count(self) -> None:
        """Sum up the children."""
        tried = sum(step.probability * step.tried for step in self.children.values())
        self.tried = 1.0 if 1 - tried < self.least else tried


class Tried:
    """The trie of one answer and the place that decoding has come to.

    Args:
        same: sets of tokens that stand for one continuation: a rejected phrase was tried whichever tag closed it.
        least: a continuation that was tried and has less than this share of its probability left is tried whole. What is
            left of a phrase that the model was sure of is debris: "an envelope" again with a word behind it that nobody
            would say. 0 keeps the exact law.
    """

    def __init__(self, same: Iterable[Iterable[int]] = (), least: float = 0.0):
        self.same = {token: tuple(tokens) for tokens in same for token in tokens}
        self.least = least
        self.path = [Step()]

    def branch(self) -> "Tried":
        """A further place, at first the same, in the same trie."""
        copy = Tried.__new__(Tried)
        copy.same, copy.least, copy.path = self.same, self.least, self.path[:]
        return copy

    def tokens(self, token: int) -> tuple[int, ...]:
        """The tokens that stand for the same continuation as `token`."""
        return self.same.get(token, (token,))

    def untried(self) -> dict[int, float]:
        """The untried shares of the next tokens that have been tried, in part or whole."""
        return {
            token: max(0.0, 1 - step.tried)
            for first, step in self.path[-1].children.items()
            if step.tried
            for token in self.tokens(first)
        }

    def to_weigh(self, token: int) -> list[int]:
        """The next tokens whose probabilities `weigh` needs when `token` was drawn."""
        children = self.path[-1].children
        known = [other for first in children for other in self.tokens(first)]
        return known if self.tokens(token)[0] in children else [*known, *self.tokens(token)]

    def weigh(self, probabilities: Mapping[int, float]) -> None:
        """The probabilities of next tokens, in the distribution that the first draw is made from.

        A place that is walked again gets them anew: after the question was rewritten they are other ones.
        """
        children = self.path[-1].children
        for first in {self.tokens(token)[0] for token in probabilities}:
            step = children.setdefault(first, Step())
            step.probability = sum(probabilities[token] for token in self.tokens(first))

    def probability(self, token: int) -> float:
        """Of this place and `token` behind it, in the distribution that the first draw is made from."""
        last = self.path[-1].children[self.tokens(token)[0]]
        return min(1.0, math.prod(step.probability for step in (*self.path[1:], last)))

    def step(self, token: int) -> None:
        """Go on to the place behind `token`."""
        self.path.append(self.path[-1].children.setdefault(self.tokens(token)[0], Step()))

    def back(self, length: int) -> None:
        """Return to the place behind the first `length` tokens."""
        del self.path[length + 1 :]

    def reject(self, token: int, complete: int = 0) -> None:
        """`token` ended a continuation that is not to be drawn again; at the last `complete` places it had all its words."""
        self.path[-1].children.setdefault(self.tokens(token)[0], Step()).tried = 1.0
        for number, step in enumerate(reversed(self.path)):
            # at places before, other phrases part, however improbable
            if number < complete:
                step.least = max(self.least, NOTHING)
            step.count()

    def exhausted(self, length: int) -> bool:
        """Was everything tried that may follow the first `length` tokens?"""
        return self.path[length].tried == 1

    def seen(self, tokens: Iterable[int]) -> bool:
        """Do `tokens` from this place on lead into a continuation that was tried whole?"""
        step = self.path[-1]
        for token in tokens:
            step = step.children.get(self.tokens(token)[0])
            if step is None:
                return False
            if step.tried == 1:
                return True
        return False
