"""Which continuations of an answer were tried, and how much of each place's probability is still untried. No torch.

Sampling without replacement one draw at a time, as in UniqueRandomizer (Shi, Bieber and Sutton, arXiv 2002.09067): a trie
holds the continuations that were drawn, each step with its probability; every next token is scaled by the share of its
subtree that was not tried. So each draw has the law of the model given that it is none of the earlier ones. Stochastic
beam search (Kool, van Hoof and Welling, arXiv 1903.06059) draws by the same law side by side.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

NOTHING = 1e-6  # a smaller share is rounding of 16-bit logits, no continuation
_LEAST = 1e-300  # of a probability, so that its logarithm is a number
_STEP = 0.25  # of the trapezoidal rule over log t, whose error is below 1e-12 here
_TIMES = np.exp(np.arange(-40.0, 5.0, _STEP))


def weights(probabilities: Sequence[float]) -> list[float]:
    """How much answers that were drawn without replacement count.

    Murthy's estimator (Sankhya 18, 1957); its gradient is the unordered set estimator (Kool, van Hoof and Welling, arXiv
    2002.06043). An answer weighs what it is probable to be the first one drawn, given the set. The weighted sum of any
    function of the answers is on average its mean over independent draws. Where hardly any of the probability was drawn all
    weights are nearly equal; where nearly all of it was they are the probabilities.

    Args:
        probabilities: of each answer, as a first draw.

    Returns:
        a weight of each, with a sum of 1.
    """
    p = np.maximum(np.asarray(probabilities, dtype=float), _LEAST)
    rest = max(1 - p.sum(), 1e-9)
    # Draws are clocks that ring at rates p; these rang before the rest did. Integrated over t, the time of the rest's first
    # ring in units of its mean, exp(-t) prod(1 - exp(-t p / rest)) is the probability of that.
    ring = -np.expm1(-np.outer(_TIMES, p / rest))
    log_density = np.log(_TIMES) - _TIMES + np.log(ring).sum(1)
    density = np.exp(log_density - log_density.max())
    return (density / density.sum() @ (p / ring)).tolist()


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
        tried = 0.0
        for step in self.children.values():
            tried += step.probability * step.tried
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
        # what was weighed and not yet needed, in order: places, tokens behind them, and what gives their probabilities
        self._waiting: list[tuple[Step, Sequence[int], Callable[[], Sequence[float]]]] = []

    def branch(self) -> "Tried":
        """A further place, at first the same, in the same trie."""
        copy = Tried.__new__(Tried)
        copy.same, copy.least, copy.path, copy._waiting = self.same, self.least, self.path[:], self._waiting
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

    def bias(self, temperature: float) -> dict[int, float]:
        """What scales the probability of each next token by the untried share of its subtree, as an addition to logits that
        are then divided by `temperature`."""
        shares = self.untried()
        return {
            token: temperature * math.log(share) if share else -math.inf for token, share in shares.items()
        }

    def to_weigh(self, token: int) -> Sequence[int]:
        """The next tokens whose probabilities `weigh` needs when `token` was drawn."""
        children = self.path[-1].children
        if not children:
            return self.tokens(token)
        known = [other for first in children for other in self.tokens(first)]
        return known if self.tokens(token)[0] in children else [*known, *self.tokens(token)]

    def weigh(self, tokens: Sequence[int], probabilities: Callable[[], Sequence[float]]) -> None:
        """The probabilities of next tokens, in the distribution that the first draw is made from.

        A place that is walked again gets them anew: after the question was rewritten they are other ones.

        Args:
            probabilities: gives one for each token. Called when a continuation is rejected and not before: a step whose
                tokens stand need not wait for the device.
        """
        self._waiting.append((self.path[-1], tokens, probabilities))

    def _settle(self) -> None:
        for place, tokens, probabilities in self._waiting:
            sums: dict[int, float] = {}
            for token, probability in zip(tokens, probabilities(), strict=True):
                first = self.tokens(token)[0]
                sums[first] = sums.get(first, 0.0) + probability
            for first, probability in sums.items():
                place.children.setdefault(first, Step()).probability = probability
        self._waiting.clear()

    def probability(self, token: int) -> float:
        """Of this place and `token` behind it, in the distribution that the first draw is made from."""
        self._settle()
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
        self._settle()
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
