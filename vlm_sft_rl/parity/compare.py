"""Readings of the same rows by two ways, compared token by token; no torch, no model."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

AROUND = 4  # tokens on either side of a place, as text


@dataclass(frozen=True)
class Reading:
    """What a way of running the model made of one row.

    Attributes:
        ids: tokens of prompt and answer, pictures expanded, no padding.
        start: where the answer begins in them.
        log_probs: of each token of the answer; None where the way gives none.
        positions: of each token, as far as they were fed: one number, or three (time, height, width). None: not to be seen.
    """

    ids: Sequence[int]
    start: int
    log_probs: Sequence[float | None]
    positions: Sequence[tuple[int, ...]] | None = None


@dataclass(frozen=True)
class Limits:
    """How far log-probabilities (natural logarithm) of one token may lie apart, and on average over all of them."""

    largest: float
    mean: float


# Measured in docs/parity.md. In 16 bits two orders of adding up give logits that differ by several hundredths.
LIMITS = {
    "float32": Limits(1e-3, 1e-4),
    "float16": Limits(0.1, 0.01),
    "bfloat16": Limits(0.5, 0.05),
}


@dataclass(frozen=True)
class Place:
    """A token: number of its row, place in the row's tokens, and what both ways have there (None: nothing)."""

    row: int
    token: int
    reference: Any
    value: Any


@dataclass(frozen=True)
class Comparison:
    """How a way's readings differ from the reference's.

    Attributes:
        ids, positions: where they differ first; None where they do not.
        shifts: by how much each row's positions are all shifted, which rotary embeddings do not see; None: not compared.
        tokens: log-probabilities that were compared.
        largest, mean: of their differences; infinite where a value is no number.
        worst: where the largest lies; None where nothing was compared.
    """

    ids: Place | None
    positions: Place | None
    shifts: tuple[int, ...] | None
    tokens: int
    largest: float
    mean: float
    worst: Place | None

    def verdict(self, limits: Limits) -> str:
        """`equal`, or what differs."""
        if self.ids is not None:
            return "token ids differ"
        if self.positions is not None:
            return "positions differ"
        if self.worst is None:
            return "nothing to compare"
        close = self.largest <= limits.largest and self.mean <= limits.mean
        return "equal" if close else "log-probabilities differ"

    @property
    def place(self) -> Place | None:
        """Where the verdict comes from: the first other token or position, else the largest difference."""
        return self.ids or self.positions or self.worst


def compare(reference: Sequence[Reading], readings: Sequence[Reading]) -> Comparison:
    """Readings of the same rows in the same order.

    Positions are compared up to one shift a row, because padding on the left shifts them where a model counts it.
    Log-probabilities are compared where the reference has them; one that the other way lacks differs infinitely.
    """
    pairs = list(enumerate(zip(reference, readings, strict=True)))
    ids = next((place for row, (a, b) in pairs if (place := _first_difference(row, a.ids, b.ids))), None)
    places, shifts = [], []
    for row, (a, b) in pairs:
        if a.positions and b.positions and list(a.ids) == list(b.ids):
            shift = b.positions[0][0] - a.positions[0][0]
            shifts.append(shift)
            places.append(_first_difference(row, *_aligned(a.positions, b.positions, shift), common=True))
    positions = next(filter(None, places), None)
    gaps = [gap for row, pair in pairs for gap in _gaps(row, *pair)]
    largest, worst = max(gaps, key=lambda gap: gap[0], default=(0.0, None))
    mean = sum(gap for gap, _ in gaps) / max(1, len(gaps))
    return Comparison(ids, positions, tuple(shifts) or None, len(gaps), largest, mean, worst)


def _first_difference(row: int, a: Sequence, b: Sequence, common: bool = False) -> Place | None:
    """Where two sequences differ first; `common`: in the part that both have."""
    for token, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return Place(row, token, left, right)
    if common or len(a) == len(b):
        return None
    token = min(len(a), len(b))
    return Place(row, token, *(values[token] if token < len(values) else None for values in (a, b)))


def _aligned(a: Sequence[tuple[int, ...]], b: Sequence[tuple[int, ...]], shift: int) -> tuple[list, list]:
    """Positions with as many numbers in both (text has the same in each plane), the second ones shifted back."""
    planes = max(len(a[0]), len(b[0]))
    wide = [[p * planes if len(p) == 1 else p for p in positions] for positions in (a, b)]
    return wide[0], [tuple(number - shift for number in p) for p in wide[1]]


def _gaps(row: int, a: Reading, b: Reading) -> Iterator[tuple[float, Place]]:
    for token, (left, right) in enumerate(zip_longest(a.log_probs, b.log_probs)):
        if left is None:
            continue
        gap = math.inf if right is None else 0.0 if left == right else abs(left - right)
        yield math.inf if math.isnan(gap) else gap, Place(row, a.start + token, left, right)


def around(ids: Sequence[int], token: int, piece: Callable[[int], str]) -> tuple[str, str, str]:
    """The text before a token, its own, and that behind it.

    Args:
        piece: id -> text.
    """
    before, behind = ids[max(0, token - AROUND) : token], ids[token + 1 : token + 1 + AROUND]
    here = piece(ids[token]) if token < len(ids) else ""
    return "".join(map(piece, before)), here, "".join(map(piece, behind))
