"""Choosing tokens for many rows at once: greedy, or by one uniform number per row (so no row depends on another)."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import NotFinite
from .tried import Tried

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


class DistinctSampling:
    """A row that draws one answer behind the other, each from what the earlier ones left (`Tried`).

    Attributes:
        tried: `ImageBranches` steps on in it; `end` goes back to its beginning.
        rng: of the draw to come.
    """

    place = ""

    def __init__(self, temperature: float):
        self.temperature, self.tried = temperature, Tried()
        self.rng: random.Random | None = None

    @property
    def logit_bias(self) -> dict[int, float]:
        return self.tried.bias(self.temperature)

    def end(self, ids: Sequence[int]) -> float:
        """`ids` were drawn and are not to be drawn again. Returns their probability as a first draw."""
        self.tried.back(len(ids) - 1)
        probability = self.tried.probability(ids[-1])
        self.tried.reject(ids[-1])
        self.tried.back(0)
        return probability

    @property
    def exhausted(self) -> bool:
        return self.tried.exhausted(0)


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


def in_range(temperatures: Iterable[float]) -> list[float]:
    """Temperatures by which logits can be divided without leaving the floats."""
    return [min(max(temperature, COLDEST), HOTTEST) for temperature in temperatures]


def _entries(biases: Sequence[Mapping[int, float]]) -> tuple[list[int], list[int], list[float]]:
    """Rows, tokens and values of biases."""
    entries = [(i, token, value) for i, bias in enumerate(biases) for token, value in bias.items()]
    row, token, value = map(list, zip(*entries, strict=True))
    return row, token, value


class Sampler:
    """Temperature, top-k and top-p sampling; ids in `suppress` (image and padding tokens) are never chosen.

    Rows have the attributes of `Sampling`.
    """

    def __init__(self, *, top_k: int | None = None, top_p: float | None = None, suppress: Iterable[int] = ()):
        self.top_k, self.top_p = top_k, top_p
        self.suppress = frozenset(suppress)
        self._suppressed = torch.tensor(sorted(self.suppress), dtype=torch.long)

    def processed(self, logits: torch.Tensor, rows: Sequence[Any]) -> torch.Tensor:
        """The logits that tokens are chosen by, of the raw ones; here the same."""
        return logits

    def choose(self, logits: torch.Tensor, rows: Sequence[Any]) -> list[int]:
        """Next tokens for `rows`; `logits` is `(rows, vocabulary)`. Raises NotFinite: they are no numbers."""
        biases = [row.logit_bias for row in rows]
        best = logits.argmax(-1, keepdim=True)  # NaN counts as the largest
        tokens = torch.where(logits.gather(-1, best).isfinite(), best, -1).squeeze(-1).tolist()
        if -1 in tokens:
            raise not_finite(rows[tokens.index(-1)].place)
        greedy = [i for i, row in enumerate(rows) if row.temperature <= 0 and biases[i]]
        if greedy:
            part = self.biased(logits[greedy], [biases[i] for i in greedy]).argmax(-1)
            for i, token in zip(greedy, part.tolist(), strict=True):
                tokens[i] = token
        sampled = [i for i, row in enumerate(rows) if row.temperature > 0]
        if sampled:
            part = logits if len(sampled) == len(rows) else logits[sampled]
            drawn = self.sample(
                part,
                [rows[i].temperature for i in sampled],
                [rows[i].rng.random() for i in sampled],
                [biases[i] for i in sampled],
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
        return self._mask(logits.to(torch.float32, copy=True))

    def _mask(self, scores: torch.Tensor) -> torch.Tensor:
        if self._suppressed.device != scores.device:  # once a run, not once a step
            self._suppressed = self._suppressed.to(scores.device)
        return scores.index_fill_(1, self._suppressed, float("-inf"))

    def biased(self, logits: torch.Tensor, biases: Sequence[Mapping[int, float]]) -> torch.Tensor:
        """`(rows, vocabulary)` logits with each row's bias; the same tensor where there is none."""
        if not any(biases):
            return logits
        row, token, added = _entries(biases)
        # in 16 bits a small bias would be rounded away
        result = logits.to(torch.float32, copy=True)
        result[row, token] += torch.tensor(added, device=logits.device)
        # a row whose bias bans all that it may say is chosen without
        banned = self.masked(result).amax(-1) == float("-inf")
        return torch.where(banned.unsqueeze(1), logits.float(), result)

    def sample(
        self,
        logits: torch.Tensor,
        temperatures: list[float],
        uniforms: list[float],
        biases: Sequence[Mapping[int, float]] = (),
    ) -> list[int]:
        """Inverse-transform sampling: `(rows, vocabulary)` logits, one temperature > 0 and one u in [0, 1) a row.

        Biases come behind top-k and top-p: they choose among what these leave.
        """
        heat = torch.tensor(in_range(temperatures), device=logits.device).unsqueeze(1)
        probabilities, order = self._kept(self.masked(logits) / heat)
        if any(biases):
            self._scale(probabilities, order, heat, biases)
        cumulative = probabilities.cumsum(-1)
        target = (
            torch.tensor(uniforms, dtype=torch.float64, device=logits.device).unsqueeze(1)
            * cumulative[:, -1:]
        )
        place = torch.searchsorted(cumulative, target, right=True)
        return (place if order is None else order.gather(1, place)).squeeze(1).tolist()

    def _scale(
        self,
        probabilities: torch.Tensor,
        order: torch.Tensor | None,
        heat: torch.Tensor,
        biases: Sequence[Mapping[int, float]],
    ) -> None:
        """Apply biases to what `_kept` gave, in place. A row of which nothing would be left stays as it is."""
        row, token, added = _entries(biases)
        row, token = torch.tensor([row, token], device=heat.device)
        # the place of each token: the vocabulary's, or that of the sorted order
        place = token if order is None else order.argsort(-1)[row, token]
        unbiased = probabilities[row, place]
        factors = (torch.tensor(added, dtype=torch.float64, device=heat.device) / heat[row, 0]).exp()
        probabilities.index_put_((row, place), unbiased * factors)
        empty = probabilities.sum(-1) <= 0
        if empty.any():
            banned = empty[row]
            probabilities.index_put_((row[banned], place[banned]), unbiased[banned])

    def _kept(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Probabilities that top-k and top-p leave, and the order they stand in (None: the vocabulary's); no sum of 1."""
        order = None
        if self.top_k is not None or self.top_p is not None:
            scores, order = scores.sort(-1, descending=True)
            if self.top_k is not None:
                scores[:, self.top_k :] = float("-inf")
        probabilities = scores.double().softmax(-1)
        if self.top_p is not None:
            cumulative = probabilities.cumsum(-1)
            # a token stays when the mass before it has not reached top_p: the first one always does
            probabilities.masked_fill_(cumulative - probabilities >= self.top_p, 0.0)
        return probabilities, order

    def probabilities(self, logits: torch.Tensor, tokens: Sequence[int]) -> list[float]:
        """P(token) of each row in its raw distribution; `logits` is `(rows, vocabulary)`."""
        logits = logits.float()
        chosen = logits.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1)).squeeze(1)
        return (chosen - logits.logsumexp(-1)).exp().tolist()

    def law(
        self, logits: torch.Tensor, temperatures: Sequence[float], tokens: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """P(token) of some tokens of each row in the distribution that `sample` draws from without a bias, those of the
        first row first; `logits` is `(rows, vocabulary)`."""
        scores = logits.float()
        if any(temperature != 1 for temperature in temperatures):
            scores = scores / torch.tensor(in_range(temperatures), device=logits.device).unsqueeze(1)
        scores = self._mask(scores.clone() if scores is logits else scores)
        if self.top_k is None and self.top_p is None:
            law = scores.log_softmax(-1)
        else:
            kept, order = self._kept(scores)
            kept = torch.zeros_like(kept).scatter_(1, order, kept)
            law = (kept / kept.sum(-1, keepdim=True)).log()
        token = torch.tensor([token for wanted in tokens for token in wanted], device=logits.device)
        if all(len(wanted) == 1 for wanted in tokens):
            return law.gather(1, token.unsqueeze(1)).squeeze(1).exp()
        row = [i for i, wanted in enumerate(tokens) for _ in wanted]
        return law[row, token].exp()

    def weigh(
        self,
        logits: torch.Tensor,
        tries: Sequence[Tried],
        temperatures: list[float],
        tokens: Sequence[int],
    ) -> None:
        """Tell what was tried how probable the drawn tokens are; `logits` is `(rows, vocabulary)`."""
        wanted = [tried.to_weigh(token) for tried, token in zip(tries, tokens, strict=True)]
        law, first = self.law(logits, temperatures, wanted), 0
        for tried, others in zip(tries, wanted, strict=True):
            tried.weigh(others, law[first : first + len(others)].tolist)
            first += len(others)

    def p_unconfident(self, logits: torch.Tensor, row: Any, unconfident: int) -> float:
        """P(</UN>) in the raw distribution; `logits` is `(vocabulary,)`."""
        return self.probabilities(logits.unsqueeze(0), [unconfident])[0]
