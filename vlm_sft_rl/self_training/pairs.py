"""From a pool to preference pairs for DPO.

`cot` pairs are the published baseline (STaR + DPO): the newest right and the newest wrong rationale of a question.
`refine` and `select` pairs put the same contrast behind a reflection prompt; they are not in the paper.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from ..errors import UserError
from ..graders.prompts import Prompts
from .builders import BuildSettings, select_groups
from .pool import Candidate, Pool

PAIR_KINDS = ("cot", "refine", "select")


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

    Raises:
        UserError: an unknown kind.
    """
    if unknown := sorted(set(kinds) - set(PAIR_KINDS)):
        raise UserError(
            f"`pair_kinds`: {', '.join(map(repr, unknown))} unknown. Kinds: {', '.join(PAIR_KINDS)}."
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
            if pair is None or pair[1] == pair[2]:
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
    return prompt, prompts.selected(right[0].answer), prompts.selected(answered[0].answer)
