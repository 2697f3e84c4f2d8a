"""Figures of test time, from one store of samples a question: pure functions of graded answers.

Every figure is a list of one number per question, so that intervals resample questions.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from math import comb

import numpy as np

from ..evaluation.bootstrap import bootstrap, paired, ratio
from ..graders.grade import majority_index
from .pool import Candidate

SHOWN, MOST_SHOWN = 3, 6  # candidates that self-select is shown, as published and for the longest curve


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


def answer_flips(before: Sequence[bool], after: Sequence[bool]) -> dict[str, int]:
    """Questions that became right, became wrong, and stayed."""
    names = {(False, True): "wrong to right", (True, False): "right to wrong"}
    pairs = zip(before, after, strict=True)
    counts = Counter(names.get((bool(a), bool(b)), "unchanged") for a, b in pairs)
    return {name: counts[name] for name in ("wrong to right", "right to wrong", "unchanged")}


def group(candidates: Sequence[Candidate], questions: Sequence[dict]) -> list[list[Candidate]]:
    """Candidates of each question, in the questions' order."""
    groups: dict[str, list[Candidate]] = {question["id"]: [] for question in questions}
    for candidate in candidates:
        groups[candidate.question].append(candidate)
    return list(groups.values())


def _counts(values: Sequence[float]) -> np.ndarray:
    return np.column_stack([np.asarray(values, dtype=float), np.ones(len(values))])


def _mean(totals: np.ndarray) -> np.ndarray:
    return ratio(totals[..., 0], totals[..., 1])


def interval(values: Sequence[float], rounds: int, seed: int) -> dict:
    """Mean over questions with its bootstrap interval: `{value, low, high}`."""
    estimate = bootstrap(_counts(values), _mean, rounds=rounds, seed=seed)
    return _rounded(estimate)


def difference(a: Sequence[float], b: Sequence[float], rounds: int, seed: int) -> dict:
    """Mean of a - b over the same questions, resampled together."""
    estimate = paired(_counts(a), _counts(b), _mean, rounds=rounds, seed=seed)
    return _rounded(estimate)


def _rounded(estimate) -> dict:
    return {name: round(getattr(estimate, name), 4) for name in ("value", "low", "high")}


def by_kind(questions: Sequence[dict], rights: Sequence[float]) -> dict[str, dict]:
    """Accuracy and n of each kind of question, where the file says kinds."""
    kinds: dict[str, list[float]] = {}
    for question, right in zip(questions, rights, strict=True):
        if "kind" in question:
            kinds.setdefault(question["kind"], []).append(right)
    return {k: {"value": round(sum(v) / len(v), 4), "n": len(v)} for k, v in sorted(kinds.items())}


def select_sizes(samples: int) -> list[int]:
    """Numbers of candidates that self-select is asked with: the published three, and 2 to 6 for a curve."""
    return [min(SHOWN, samples)] if samples <= SHOWN else list(range(2, min(MOST_SHOWN, samples) + 1))


def scaling(
    samples: Sequence[Sequence[Candidate]],
    rounds: int,
    seed: int,
    selections: Mapping[int, Sequence[Candidate]] | None = None,
) -> list[dict]:
    """Majority vote and pass@n over n = 1..K samples, self-select where it was asked, with intervals over questions."""
    points = []
    for n in range(1, len(samples[0]) + 1):
        vote = [majority_at(cs, n, seed) for cs in samples]
        passed = [pass_at_k([c.right for c in cs], n) for cs in samples]
        point = {"n": n, "majority": interval(vote, rounds, seed), "pass": interval(passed, rounds, seed)}
        if selections and n in selections:
            point["self_select"] = interval([c.right for c in selections[n]], rounds, seed)
        points.append(point)
    return points
