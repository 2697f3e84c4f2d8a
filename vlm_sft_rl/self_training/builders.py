"""From a pool to training rows (R3V, arXiv 2411.00855, section 3): pure functions of the questions, the pool and a seed.

Per question, from its newest right candidate P1 (P2 the next), and its newest wrong one N1 (N2):

    direct   question -> bare gold answer            always
    cot      question -> P1                          one right
    refine   question, N1 -> P1                      one right, one wrong
    select   question, {P1, P2, N1} -> its answer    two right, one wrong     (in shuffled order)
             question, {P1, N1, N2} -> its answer    one right, two wrong

The gold answer appears nowhere but in the targets of direct rows; all other targets are what the model wrote itself.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..data.rows import BUILT_PAIRS
from ..errors import UserError
from ..graders.prompts import Prompts
from .pool import Candidate, Pool

Fits = Callable[[dict], bool]
SHORTEST_CANDIDATE = 12  # words that are left of a candidate when a row is too long


@dataclass(frozen=True)
class BuildSettings:
    """What the mixture is made of.

    Attributes:
        direct, cot, refine, select: kinds of rows.
        select_sizes: numbers of candidates of select rows; 3 is the published one and makes the 2+1 and 1+2 rows, any
            other size makes up to `rows_per_size` rows with at least one right and one wrong candidate.
        max_solve_rate: leave out questions of which a larger share of candidates is right (None: none).
        balance: per kind of the model's own rows, at most the mean number for each answer, so that frequent answers do
            not prevail; direct and warm-up rows stay whole.
    """

    direct: bool = True
    cot: bool = True
    refine: bool = True
    select: bool = True
    select_sizes: tuple[int, ...] = (3,)
    rows_per_size: int = 2
    max_solve_rate: float | None = None
    balance: bool = False
    seed: int = 0

    def __post_init__(self):
        """Raises UserError: a size below 2, or a rate outside of [0, 1]."""
        if any(not isinstance(size, int) or size < 2 for size in self.select_sizes):
            raise UserError(
                f"`select_sizes`: every size must be an integer >= 2, found {self.select_sizes!r}."
            )
        if self.max_solve_rate is not None and not 0 <= self.max_solve_rate <= 1:
            raise UserError(f"`max_solve_rate` must lie in [0, 1], found {self.max_solve_rate!r}.")


@dataclass
class Mixture:
    """Rows, and how many of each kind were made, shortened or left out."""

    rows: list[dict] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)


def build_mixture(
    questions: Sequence[dict],
    pool: Pool,
    rationales: Iterable[dict],
    prompts: Prompts,
    settings: BuildSettings,
    fits: Fits | None = None,
) -> Mixture:
    """All rows of a round, shuffled under the seed.

    Args:
        rationales: warm-up rows: question rows with a `rationale`, taught as `cot` rows in every round.
        fits: whether a row is short enough; over-long select and refine rows lose a candidate, or candidates lose
            their beginnings; a row that does not fit even so is left out and counted, never cut.
    """
    mixture = Mixture()
    gold_rows = [
        _row(question, "direct", prompts.ask_directly(question), question["answer"])
        for question in questions
        if settings.direct
    ]
    for question in rationales:
        gold_rows.append(_row(question, "cot", prompts.ask(question), question["rationale"], name="warmup"))
    model_rows: list[tuple[dict, str]] = []  # row, answer
    for question in questions:
        candidates = pool.get(question["id"], [])
        if _is_too_easy(candidates, settings):
            mixture.counts["question too easy"] += 1
            continue
        rows = reflection_rows(question, candidates, prompts, settings, fits, mixture.counts)
        model_rows += [(row, question["answer"]) for row in rows]

    def is_short(row: dict) -> bool:
        if fits is None or fits(row):
            return True
        mixture.counts[f"{row_kind(row)} too long"] += 1
        return False

    gold_rows = [row for row in gold_rows if is_short(row)]
    model_rows = [(row, answer) for row, answer in model_rows if is_short(row)]
    if settings.balance:
        model_rows = balance(model_rows, settings.seed, mixture.counts)
    mixture.rows = [*gold_rows, *(row for row, _ in model_rows)]
    mixture.counts.update(row_kind(row) for row in mixture.rows)
    random.Random(f"{settings.seed}-mixture").shuffle(mixture.rows)
    return mixture


def _is_too_easy(candidates: list[Candidate], settings: BuildSettings) -> bool:
    if not candidates or settings.max_solve_rate is None:
        return False
    return sum(c.right for c in candidates) / len(candidates) > settings.max_solve_rate


def reflection_rows(
    question: dict,
    candidates: Sequence[Candidate],
    prompts: Prompts,
    settings: BuildSettings,
    fits: Fits | None = None,
    counts: Counter | None = None,
) -> list[dict]:
    """The cot, refine and select rows of one question; `candidates` oldest first."""
    counts = Counter() if counts is None else counts
    right = [c for c in reversed(candidates) if c.right]
    wrong = [c for c in reversed(candidates) if not c.right]
    rows = []
    if settings.cot and right:
        rows.append(_row(question, "cot", prompts.ask(question), right[0].text.strip()))
    if settings.refine and right and wrong:
        rows.append(_refine_row(question, right[0], wrong[0], prompts, fits, counts))
    if settings.select and right and wrong:
        for number, group in enumerate(select_groups(question["id"], right, wrong, settings)):
            rows.append(_select_row(question, group, right, prompts, fits, counts, number))
    return rows


def select_groups(
    identity: str, right: Sequence[Candidate], wrong: Sequence[Candidate], settings: BuildSettings
) -> list[list[Candidate]]:
    """Candidate sets of one question, each shuffled once; `right` and `wrong` newest first.

    Positives of a set share one answer: a question with two right answers has no single target.
    """
    rng = random.Random(f"{settings.seed}-{identity}-select")
    agreeing = [c for c in right if c.key == right[0].key]
    groups: list[list[Candidate]] = []
    for size in settings.select_sizes:
        if size == 3:
            if len(agreeing) >= 2:
                groups.append([agreeing[0], agreeing[1], wrong[0]])
            if len(wrong) >= 2:
                groups.append([agreeing[0], wrong[0], wrong[1]])
            continue
        seen: set[frozenset] = set()
        for _ in range(3 * settings.rows_per_size):
            group = _draw(rng, agreeing, wrong, size)
            names = frozenset((c.round, c.index) for c in group)
            if group and names not in seen and len(seen) < settings.rows_per_size:
                seen.add(names)
                groups.append(group)
    for group in groups:
        rng.shuffle(group)
    return groups


def _draw(
    rng: random.Random, right: Sequence[Candidate], wrong: Sequence[Candidate], size: int
) -> list[Candidate]:
    """`size` candidates, at least one right and one wrong; nothing when there are too few."""
    least, most = max(1, size - len(wrong)), min(len(right), size - 1)
    if least > most:
        return []
    count = rng.randint(least, most)
    return rng.sample(list(right), count) + rng.sample(list(wrong), size - count)


def _refine_row(question, right, wrong, prompts, fits, counts) -> dict:
    def build(texts: Sequence[str]) -> dict:
        return _row(question, "refine", prompts.ask_to_refine(question, texts[0]), right.text.strip())

    return _shortened(build, [wrong.text], fits, counts, "refine")


def _select_row(question, group, right, prompts, fits, counts, number: int) -> dict:
    target = _selected(question, nearest(question, [c for c in group if c.right]), prompts)

    def build(texts: Sequence[str]) -> dict:
        return _row(
            question, "select", prompts.ask_to_select(question, texts), target, name=f"select{number}"
        )

    if fits is not None:
        while len(group) > 2 and not fits(build([c.text for c in group])):
            spare = [c for c in group if sum(o.right == c.right for o in group) > 1]
            longest = max(spare, key=lambda c: len(c.text))
            group = [c for c in group if c is not longest]
            counts["select candidate dropped"] += 1
    return _shortened(build, [c.text for c in group], fits, counts, "select")


def _selected(question: dict, candidate: Candidate, prompts: Prompts) -> str:
    by_letter = prompts.target_letter and question.get("choices")
    return prompts.selected(candidate.key if by_letter else candidate.answer)


def nearest(question: dict, right: Sequence[Candidate]) -> Candidate:
    """The right candidate that is nearest to the gold answer where numbers differ within a tolerance; the newest where
    they do not (`right` newest first, or in any order when all agree)."""
    try:
        gold = float(question["answer"])
        return min(right, key=lambda c: abs(float(c.key) - gold))
    except (TypeError, ValueError):
        return right[0]


def _shortened(build, texts: list[str], fits: Fits | None, counts: Counter, kind: str) -> dict:
    """The row, its candidates cut from their beginnings until it fits: their answers stand at the end."""
    texts, cut = list(texts), False
    while fits is not None and not fits(row := build(texts)):
        longest = max(range(len(texts)), key=lambda i: len(texts[i].split()))
        words = texts[longest].split()
        if len(words) <= SHORTEST_CANDIDATE:
            return row  # the caller counts it as too long
        keep = max(SHORTEST_CANDIDATE, len(words) * 3 // 4)
        texts[longest] = "… " + " ".join(words[-keep:]) if keep < len(words) - 1 else " ".join(words[-keep:])
        cut = True
    if cut:
        counts[f"{kind} candidate shortened"] += 1
    return build(texts)


def _row(question: dict, kind: str, prompt: str, target: str, name: str | None = None) -> dict:
    return {
        "id": f"{question['id']}/{name or kind}",
        "images": list(question["images"]),
        "messages": [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": target, "answer_type": kind},
        ],
    }


def row_kind(row: dict) -> str:
    return row["messages"][-1]["answer_type"]


def balance(rows: Sequence[tuple[dict, str]], seed: int, counts: Counter) -> list[tuple[dict, str]]:
    """Per kind, cap the rows of each answer at the mean over answers (rounded up)."""
    groups: dict[tuple[str, str], list[int]] = {}
    for place, (row, answer) in enumerate(rows):
        groups.setdefault((row_kind(row), answer), []).append(place)
    totals: Counter = Counter()
    values: Counter = Counter()
    for (kind, _), places in groups.items():
        totals[kind] += len(places)
        values[kind] += 1
    dropped: set[int] = set()
    for (kind, answer), places in sorted(groups.items()):
        cap = -(-totals[kind] // values[kind])
        if len(places) > cap:
            kept = random.Random(f"{seed}-{kind}-{answer}").sample(places, cap)
            dropped |= set(places) - set(kept)
            counts[f"{kind} left out for balance"] += len(places) - cap
    return [item for place, item in enumerate(rows) if place not in dropped]


def build_pairs(
    questions: Sequence[dict],
    pool: Pool,
    prompts: Prompts,
    kinds: Sequence[str] = ("cot",),
    *,
    weights: Mapping[str, float] | None = None,
    seed: int = 0,
) -> tuple[list[dict], Counter]:
    """Pairs of all questions with right and wrong candidates, and their counts.

    Returns:
        Rows of TRL's conversational preference format (`prompt`, `chosen`, `rejected`, `images`) with `pair_kind` and
        `pair_weight`.

    Raises UserError: an unknown kind.
    """
    if unknown := sorted(set(kinds) - set(BUILT_PAIRS)):
        raise UserError(
            f"`pair_kinds`: {', '.join(map(repr, unknown))} unknown. Kinds: {', '.join(BUILT_PAIRS)}."
        )
    rows, counts = [], Counter()
    for question in questions:
        candidates = pool.get(question["id"], [])
        right = [c for c in reversed(candidates) if c.right]
        wrong = [c for c in reversed(candidates) if not c.right]
        if not right or not wrong:
            continue
        for kind in kinds:
            pair = _pair(kind, question, right, wrong, prompts, seed)
            if pair is None or pair[1].split() == pair[2].split():
                continue
            prompt, chosen, rejected = pair
            rows.append(
                {
                    "id": f"{question['id']}/{kind}",
                    "images": list(question["images"]),
                    "prompt": [{"role": "user", "content": prompt}],
                    "chosen": [{"role": "assistant", "content": chosen}],
                    "rejected": [{"role": "assistant", "content": rejected}],
                    "pair_kind": kind,
                    "pair_weight": float((weights or {}).get(kind, 1.0)),
                }
            )
            counts[f"{kind} pair"] += 1
    return rows, counts


def _pair(
    kind: str,
    question: dict,
    right: list[Candidate],
    wrong: list[Candidate],
    prompts: Prompts,
    seed: int,
) -> tuple[str, str, str] | None:
    """(prompt, chosen, rejected); None where the question has too few candidates of the sort."""
    if kind == "cot":
        return prompts.ask(question), right[0].text.strip(), wrong[0].text.strip()
    if kind == "refine":
        if len(wrong) < 2:
            return None
        return (
            prompts.ask_to_refine(question, wrong[0].text),
            right[0].text.strip(),
            wrong[1].text.strip(),
        )
    answered = [c for c in wrong if c.answer is not None]
    if not answered:
        return None
    groups = select_groups(question["id"], right, answered, BuildSettings(seed=seed))
    if not groups:
        return None
    prompt = prompts.ask_to_select(question, [c.text for c in groups[0]])
    return prompt, _selected(question, right[0], prompts), _selected(question, answered[0], prompts)
