"""Test time, from one store of samples: pure functions of graded answers. Every figure is a list of 0/1 per question."""

import random
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from math import comb

from ..graders.voting import majority_index
from .pool import Candidate


def majority(candidates: Sequence[Candidate]) -> Candidate | None:
    """The first candidate with the most frequent answer; a tie goes to the answer that came first. Unreadable outputs
    have no vote; None when there is no readable one."""
    chosen = majority_index([c.key for c in candidates])
    return None if chosen is None else candidates[chosen]


def majority_right(candidates: Sequence[Candidate]) -> int:
    chosen = majority(candidates)
    return int(chosen is not None and chosen.right)


def pass_at_k(rights: Sequence[bool], k: int) -> float:
    """Unbiased estimate that at least one of `k` samples is right, from n >= k samples: 1 - C(n - c, k) / C(n, k)."""
    n, c = len(rights), sum(rights)
    if not 1 <= k <= n:
        raise ValueError(f"k must lie in 1..{n}, found {k}")
    return 1 - comb(n - c, k) / comb(n, k)


def majority_at(candidates: Sequence[Candidate], k: int, seed: int, draws: int = 50) -> float:
    """Share of right majorities over subsets of `k` samples: over all when there are at most `draws` (so that one sample
    votes as often right as it is right), otherwise over so many random ones."""
    if comb(len(candidates), k) <= draws:
        rights = [majority_right(subset) for subset in combinations(candidates, k)]
        return sum(rights) / len(rights)
    rng = random.Random(f"{seed}-{candidates[0].question}-{k}")
    return sum(majority_right(rng.sample(list(candidates), k)) for _ in range(draws)) / draws


def out_of_candidates(selected: Candidate, candidates: Sequence[Candidate]) -> int:
    """Whether a selection answers something that no candidate says; an unreadable selection does so too."""
    return int(selected.key is None or selected.key not in {c.key for c in candidates})


def flips(before: Sequence[bool], after: Sequence[bool]) -> dict[str, int]:
    """Questions that became right, became wrong, and stayed."""
    names = {(False, True): "wrong to right", (True, False): "right to wrong"}
    pairs = zip(before, after, strict=True)
    counts = Counter(names.get((bool(a), bool(b)), "unchanged") for a, b in pairs)
    return {name: counts[name] for name in ("wrong to right", "right to wrong", "unchanged")}
