"""A round's figures on the test questions, all from one store of samples and four greedy passes."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..evaluation.bootstrap import bootstrap, paired, ratio
from ..files import write_json, write_jsonl
from ..graders import FORMAT
from .pool import Candidate, grade_samples
from .sampling import task
from .selection import flips, majority_at, majority_right, out_of_candidates, pass_at_k

if TYPE_CHECKING:
    from .driver import SelfTraining

SHOWN, MOST_SHOWN = 3, 6
SYSTEMS = ("direct", "greedy", "sample", "majority", "self_select", "self_refine", "pass_at_k")


def evaluate_round(run: "SelfTraining", round_: int) -> dict:
    """Answer and grade; writes `graded.jsonl` and `metrics.json` of the round and returns the latter."""
    config, prompts, test = run.config, run.prompts, run.test
    greedy_settings = {**config.sampling(), "temperature": 0.0, "top_p": None, "top_k": None}

    def greedy_pass(name: str, asked: Sequence[str]) -> list[Candidate]:
        tasks = [task(q, p) for q, p in zip(test, asked, strict=True)]
        lines = run.answers(round_, f"test/{name}", tasks, 1, greedy_settings)
        return grade_samples(lines, test, run.grader, round_=round_)

    direct = greedy_pass("direct", [prompts.ask_directly(q) for q in test])
    greedy = greedy_pass("greedy", [prompts.ask(q) for q in test])
    tasks = [task(q, prompts.ask(q)) for q in test]
    lines = run.answers(round_, "test/samples", tasks, config.test_samples, config.sampling())
    samples = group(grade_samples(lines, test, run.grader, round_=round_), test)
    shown = [candidates[:SHOWN] for candidates in samples]

    def select_of(n: int) -> list[Candidate]:
        asked = [
            prompts.ask_to_select(q, [c.text for c in cs[:n]]) for q, cs in zip(test, samples, strict=True)
        ]
        return greedy_pass("select" if n == SHOWN else f"select-{n}", asked)

    selections = {n: select_of(n) for n in select_sizes(config.test_samples)}
    select = selections[min(SHOWN, config.test_samples)]
    refine = greedy_pass(
        "refine", [prompts.ask_to_refine(q, c.text) for q, c in zip(test, greedy, strict=True)]
    )
    write_jsonl(
        run.folder(round_) / "graded.jsonl",
        [
            {
                "id": question["id"],
                "answer": question["answer"],
                "direct": a.to_json(),
                "greedy": b.to_json(),
                "samples": [c.to_json() for c in cs],
                "self_select": d.to_json(),
                "self_refine": e.to_json(),
            }
            for question, a, b, cs, d, e in zip(test, direct, greedy, samples, select, refine, strict=True)
        ],
    )
    values = {
        "direct": [c.right for c in direct],
        "greedy": [c.right for c in greedy],
        "sample": [sum(c.right for c in cs) / len(cs) for cs in samples],
        "majority": [majority_right(cs) for cs in shown],
        "self_select": [c.right for c in select],
        "self_refine": [c.right for c in refine],
        "pass_at_k": [float(any(c.right for c in cs)) for cs in shown],
        "out_of_candidates": [out_of_candidates(c, cs) for c, cs in zip(select, shown, strict=True)],
        "format_failures": [c.status == FORMAT for c in greedy],
    }
    rounds, seed = config.bootstrap_rounds, run.seed
    metrics = {
        "round": round_,
        "n": len(test),
        "k": len(shown[0]),
        **{name: interval(v, rounds, seed) for name, v in values.items()},
        "flips": {
            "refine against greedy": flips(values["greedy"], values["self_refine"]),
            "select against greedy": flips(values["greedy"], values["self_select"]),
        },
        "differences": {
            "self_select - majority": difference(values["self_select"], values["majority"], rounds, seed),
            "self_select - greedy": difference(values["self_select"], values["greedy"], rounds, seed),
            "self_refine - greedy": difference(values["self_refine"], values["greedy"], rounds, seed),
        },
        "by_kind": by_kind(test, values["greedy"]),
        "scaling": scaling(samples, rounds, seed, selections),
    }
    write_json(run.folder(round_) / "metrics.json", metrics)
    run.console.print(
        "  test: " + ", ".join(f"{name} {metrics[name]['value']:.3f}" for name in SYSTEMS), highlight=False
    )
    return metrics


def group(candidates: Sequence[Candidate], questions: Sequence[dict]) -> list[list[Candidate]]:
    """Candidates of each question, in the questions' order."""
    found: dict[str, list[Candidate]] = {question["id"]: [] for question in questions}
    for candidate in candidates:
        found[candidate.question].append(candidate)
    return list(found.values())


def _counts(values: Sequence[float]) -> np.ndarray:
    return np.column_stack([np.asarray(values, dtype=float), np.ones(len(values))])


def _mean(totals: np.ndarray) -> np.ndarray:
    return ratio(totals[..., 0], totals[..., 1])


def interval(values: Sequence[float], rounds: int, seed: int) -> dict:
    """Mean over questions with its bootstrap interval: `{value, low, high}`."""
    found = bootstrap(_counts(values), _mean, rounds=rounds, seed=seed)
    return {"value": round(found.value, 4), "low": round(found.low, 4), "high": round(found.high, 4)}


def difference(a: Sequence[float], b: Sequence[float], rounds: int, seed: int) -> dict:
    """Mean of a - b over the same questions, resampled together."""
    found = paired(_counts(a), _counts(b), _mean, rounds=rounds, seed=seed)
    return {"value": round(found.value, 4), "low": round(found.low, 4), "high": round(found.high, 4)}


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
