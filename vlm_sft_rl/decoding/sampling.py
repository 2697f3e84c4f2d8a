"""Choosing tokens for many rows at once: greedy, or by one uniform number per row (so no row depends on another)."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import NotFinite

COLDEST, HOTTEST = 1e-30, 1e30


@dataclass
class Sampling:
    """How a row chooses its tokens: greedy at temperature 0, else from `rng`.

    Attributes:
        place: where it is, for errors.
        logit_bias: what is added to the logits of some tokens.
    """

    temperature: float = 0.0
    rng: random.Random | None = None
    place: str = ""
    logit_bias: Mapping[int, float] = field(default_factory=dict)


GREEDY = Sampling()


def row_rng(seed: int, row_id: str) -> random.Random:
    """A separate stream for each (seed, id): an answer does not depend on its batch."""
    return random.Random(f"{seed}\x1f{row_id}")


def place_of(name: str, tokens: int) -> str:
    """Where an answer is that has so many tokens."""
    return f"answer to {name!r}, token {tokens + 1}"


def not_finite(place: str) -> NotFinite:
    """The error of a place where the model's logits are no numbers."""
    where = f"{place}: the" if place else "The"
    return NotFinite(
        f"{where} model's logits are NaN or infinite, so it says nothing. Are its weights broken, or too large for "
        "float16? Try float32, or an earlier checkpoint."
    )


def biased(logits: torch.Tensor, biases: Sequence[Mapping[int, float] | None]) -> torch.Tensor:
    """`(rows, vocabulary)` logits with each row's bias; the same tensor where there is none."""
    if not any(biases):
        return logits
    row = [i for i, bias in enumerate(biases) for _ in bias or ()]
    token = [token for bias in biases for token in bias or ()]
    added = [value for bias in biases for value in (bias or {}).values()]
    logits = logits.to(torch.float32, copy=True)  # in 16 bits a small bias would be rounded away
    logits[row, token] += torch.tensor(added, device=logits.device)
    return logits


class Sampler:
    """Temperature, top-k and top-p sampling; ids in `suppress` (image and padding tokens) are never chosen.

    Rows have the attributes of `Sampling`; `place` and `logit_bias` may be missing.
    """

    def __init__(self, *, top_k: int | None = None, top_p: float | None = None, suppress: Iterable[int] = ()):
        self.top_k, self.top_p = top_k, top_p
        self.suppress = frozenset(suppress)
        self._suppress_ids = sorted(self.suppress)

    def choose(self, logits: torch.Tensor, rows: Sequence[Any]) -> list[int]:
        """Next tokens for `rows`; `logits` is `(rows, vocabulary)`, raw. Raises NotFinite: they are no numbers."""
        logits = biased(logits, [getattr(row, "logit_bias", None) for row in rows])
        best = logits.argmax(-1, keepdim=True)  # NaN counts as the largest
        tokens = torch.where(logits.gather(-1, best).isfinite(), best, -1).squeeze(-1).tolist()
        if -1 in tokens:
            raise not_finite(getattr(rows[tokens.index(-1)], "place", ""))
        sampled = [i for i, row in enumerate(rows) if row.temperature > 0]
        if sampled:
            part = logits if len(sampled) == len(rows) else logits[sampled]
            drawn = self.sample(
                part, [rows[i].temperature for i in sampled], [rows[i].rng.random() for i in sampled]
            )
            for i, token in zip(sampled, drawn, strict=True):
                tokens[i] = token
        if self.suppress and not self.suppress.isdisjoint(tokens):
            # checked after the fact: masking every step would cost more than the rare second look
            for i, token in enumerate(tokens):
                if token in self.suppress:
                    tokens[i] = int(self.masked(logits[i : i + 1]).argmax(-1))
        return tokens

    def masked(self, logits: torch.Tensor) -> torch.Tensor:
        """A copy without the suppressed ids, float32; `(rows, vocabulary)`."""
        logits = logits.float().clone()
        logits[:, self._suppress_ids] = float("-inf")
        return logits

    def sample(self, logits: torch.Tensor, temperatures: list[float], uniforms: list[float]) -> list[int]:
        """Inverse-transform sampling: `(rows, vocabulary)` logits, one temperature > 0 and one u in [0, 1) a row."""
        # within what logits can be divided by without leaving the floats
        heat = [min(max(temperature, COLDEST), HOTTEST) for temperature in temperatures]
        scores = self.masked(logits) / torch.tensor(heat, device=logits.device).unsqueeze(1)
        order = None
        if self.top_k is not None or self.top_p is not None:
            scores, order = scores.sort(-1, descending=True)
            if self.top_k is not None:
                scores[:, self.top_k :] = float("-inf")
        probabilities = scores.double().softmax(-1)
        cumulative = probabilities.cumsum(-1)
        if self.top_p is not None:
            # a token stays when the mass before it has not reached top_p: the first one always does
            probabilities.masked_fill_(cumulative - probabilities >= self.top_p, 0.0)
            cumulative = probabilities.cumsum(-1)
        target = (
            torch.tensor(uniforms, dtype=torch.float64, device=logits.device).unsqueeze(1)
            * cumulative[:, -1:]
        )
        place = torch.searchsorted(cumulative, target, right=True)
        return (place if order is None else order.gather(1, place)).squeeze(1).tolist()

    def probabilities(self, logits: torch.Tensor, tokens: Sequence[int]) -> list[float]:
        """P(token) of each row in its raw distribution; `logits` is `(rows, vocabulary)`."""
        logits = logits.float()
        chosen = logits.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1)).squeeze(1)
        return (chosen - logits.logsumexp(-1)).exp().tolist()

    def law(
        self, logits: torch.Tensor, temperatures: list[float], tokens: Sequence[Sequence[int]]
    ) -> list[dict[int, float]]:
        """P(token) of some tokens of each row in the distribution that it samples from: at its temperature, without the
        suppressed ids; top-k and top-p left aside. `logits` is `(rows, vocabulary)`."""
        logits = logits.float() / torch.tensor(temperatures, device=logits.device).unsqueeze(1)
        logits[:, self._suppress_ids] = float("-inf")
        total = logits.logsumexp(-1)
        row = [i for i, wanted in enumerate(tokens) for _ in wanted]
        flat = [token for wanted in tokens for token in wanted]
        values = iter((logits[row, flat] - total[row]).exp().tolist())
        return [{token: next(values) for token in wanted} for wanted in tokens]

    def p_unconfident(self, logits: torch.Tensor, row: Any, unconfident: int) -> float:
        """P(</UN>) in the raw distribution; `logits` is `(vocabulary,)`."""
        return self.probabilities(logits.unsqueeze(0), [unconfident])[0]
