"""`vlm-sft-rl data correct`: correction rows from question files, with a model's own attempts and a teacher; resumable.

Attempts and the teacher's answers are sample stores (`OUT/attempts`, `OUT/teacher`), resumed by id, so that a killed run
asks only for what is missing; rows and rejects are then written anew from them.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console

from ..data.stages import conclusion
from ..errors import UserError
from ..graders import load_grader
from ..graders.grade import grade_staged
from ..io import write_json, write_jsonl
from ..runs import digest, model_digest
from ..self_training.sampling import EndpointSampler, HFSampler, run_sampling, task
from .build import (
    GOLD,
    OWN,
    Attempt,
    BuildConfig,
    choose_attempts,
    fault_of,
    refine_prompt,
    refine_rows,
    repair_prompt,
    repair_rows,
)
from .source import read_source


@dataclass
class Cost:
    """What was asked of models in this and earlier runs into the same folder; money only where an endpoint counts it."""

    attempts: Counter = field(default_factory=Counter)
    teacher: Counter = field(default_factory=Counter)


def build_corrections(
    questions_file: str | Path,
    output_dir: str | Path,
    config: BuildConfig,
    *,
    image_root: str | Path | None = None,
    console: Console | None = None,
) -> dict:
    """Write `rows.jsonl`, `rejects.jsonl` and `summary.json`; returns the summary. Run again to go on.

    Questions are `{"id", "images", "question", "answer"}` rows. Refine mode needs a staged answer in the field `staged`.

    Raises:
        UserError: bad questions, a folder of another configuration, a teacher that does not answer, too few attempts.
    """
    started = time.monotonic()
    output, console = Path(output_dir), console or Console()
    root = image_root or Path(questions_file).parent
    # refined answers keep their conclusion, which needs no grader
    grader = load_grader(config.grader) if config.mode == "repair" else None
    cost, counts, rejects = Cost(), Counter(), []
    questions = read_source(questions_file, root, grader, counts)
    by_id = {q["id"]: q for q in questions}
    counts["questions"] = len(questions)

    def ask_teacher(prompts: dict[str, tuple[dict, str]]) -> dict[str, list[str]]:
        return _ask_teacher(config, prompts, output / "teacher", root, cost, console)

    if config.mode == "repair":
        attempts = _attempts(config, questions, grader, output / "attempts", root, cost, console)
        counts.update(f"attempts {a.status}" for a in attempts)
        wanted = {"wrong_share": config.wrong_share, "per_question": config.per_question, "seed": config.seed}
        chosen = choose_attempts(attempts, limit=config.limit, **wanted)
        wrong = [a for a in chosen if not a.right or config.keep == "teacher"]
        candidates = _repairs(config, wrong, attempts, by_id, ask_teacher)
        corrections = {}
        for attempt in wrong:
            place = (attempt.question, attempt.index)
            text, fault = _first_valid(
                candidates.get(place, []), lambda t, a=attempt: fault_of(t, grader, by_id[a.question])
            )
            if text is None:
                rejects.append({"id": f"{attempt.question}/{attempt.index}", "reason": fault})
            else:
                corrections[place] = text
        rows = repair_rows(chosen, by_id, corrections, config.prompt, config.ask, keep=config.keep)
    else:
        rows = _refined(config, questions, ask_teacher, rejects)
    if not rows:
        raise UserError(
            f"No row could be built: {dict(Counter(r['reason'] for r in rejects))}. Look at {output}/teacher, then change "
            "the teacher or its prompts."
        )
    counts["rows"] = len(rows)
    counts["rows repairing"] = sum(m.get("weight") == 0 for row in rows for m in row["messages"])
    summary = {
        "mode": config.mode,
        "counts": dict(sorted(counts.items())),
        "rejected": dict(Counter(r["reason"] for r in rejects)),
        "cost": {"attempts": dict(cost.attempts), "teacher": dict(cost.teacher)},
        "config": asdict(config),
        "seconds": round(time.monotonic() - started, 1),
    }
    write_jsonl(output / "rows.jsonl", rows)
    write_jsonl(output / "rejects.jsonl", rejects)
    write_json(output / "summary.json", summary)
    return summary


def _attempts(config, questions, grader, folder: Path, root, cost: Cost, console) -> list[Attempt]:
    tasks = [task(q, config.ask.replace("{question}", q["question"])) for q in questions]
    sampling = {
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": None,
        "max_new_tokens": config.max_new_tokens,
        "stop": (),
    }
    sampler = HFSampler(config.model, root, batch_size=config.batch_size)
    lines = _sample(
        sampler, folder, tasks, sampling, config.samples, config.seed, config.model, "attempts", console
    )
    _count(cost.attempts, lines)
    by_id = {q["id"]: q for q in questions}
    found = []
    for line in lines:
        identity, text = line["question_id"], line["answer"]
        status = grade_staged(grader, text, by_id[identity]).status
        found.append(Attempt(identity, line["index"], text, status))
    return found


def _repairs(
    config: BuildConfig,
    wrong: Sequence[Attempt],
    attempts: Sequence[Attempt],
    by_id: dict[str, dict],
    ask: Callable[[dict[str, tuple[dict, str]]], dict[str, list[str]]],
) -> dict[tuple[str, int], list[str]]:
    """For every wrong attempt the teacher's answers to it."""
    if config.teacher == GOLD:
        return {(a.question, a.index): [_gold(by_id[a.question], config.gold_field)] for a in wrong}
    if config.teacher == OWN:
        right: dict[str, list[str]] = {}
        for attempt in attempts:
            if attempt.right:
                right.setdefault(attempt.question, []).append(attempt.text)
        return {(a.question, a.index): right.get(a.question, []) for a in wrong}
    prompts = {}
    for a in wrong:
        question = by_id[a.question]
        if a.right:
            prompt = refine_prompt(question["question"], a.text)
        else:
            prompt = repair_prompt(question["question"], a.text, question["answer"])
        prompts[f"{a.question}-{a.index}"] = (question, prompt)
    answers = ask(prompts)
    return {(a.question, a.index): answers[f"{a.question}-{a.index}"] for a in wrong}


def _refined(config: BuildConfig, questions, ask, rejects: list[dict]) -> list[dict]:
    found, prompts = [], {}
    for question in questions[: config.limit]:
        first = _gold(question)
        fault = fault_of(first, None, {})
        if fault is not None:
            rejects.append({"id": question["id"], "reason": f"own answer: {fault}"})
        else:
            prompts[question["id"]] = (question, refine_prompt(question["question"], first))
    if config.teacher == GOLD:
        answers = {i: [_gold(q, config.gold_field)] for i, (q, _) in prompts.items()}
    else:
        answers = ask(prompts)
    for identity, (question, _) in prompts.items():
        first = _gold(question)
        said = conclusion(first)
        text, fault = _first_valid(answers[identity], lambda t, s=said: fault_of(t, None, {}, equals=s))
        if text is None:
            rejects.append({"id": identity, "reason": fault})
        else:
            found.append((question, first, text))
    return refine_rows(found, config.prompt, config.ask)


def _gold(question: dict, field: str = "staged") -> str:
    text = question.get(field)
    if not isinstance(text, str) or not text.strip():
        raise UserError(
            f"question {question['id']!r}: no staged answer in the field `{field}`. Give a file of staged "
            "conversations (LLaVA-CoT-100k), or name a teacher."
        )
    return text


def _first_valid(texts: Sequence[str], fault: Callable[[str], str | None]) -> tuple[str | None, str]:
    reason = "no answer"
    for text in texts:
        reason = fault(text)
        if reason is None:
            return text, ""
    return None, reason


def _ask_teacher(
    config: BuildConfig, prompts, folder: Path, root, cost: Cost, console
) -> dict[str, list[str]]:
    tasks = [{"id": i, "images": list(q["images"]), "prompt": prompt} for i, (q, prompt) in prompts.items()]
    sampling = {
        "temperature": config.teacher_temperature,
        "top_p": None,
        "top_k": None,
        "max_new_tokens": config.max_new_tokens,
        "stop": (),
    }
    if config.is_endpoint:
        from ..teacher import EndpointClient

        client = EndpointClient(
            config.teacher,
            config.teacher_model,
            ledger=folder.parent / "teacher-ledger.jsonl",
            input_price=config.input_price,
            output_price=config.output_price,
            budget=config.budget,
        )
        with client:
            name = f"{config.teacher} {config.teacher_model}"
            sampler = EndpointSampler(client, root)
            lines = _sample(
                sampler, folder, tasks, sampling, config.tries, config.seed, name, "teacher", console
            )
            cost.teacher.update({k: v for k, v in client.usage.to_json().items() if v})
    else:
        sampler = HFSampler(config.teacher, root, batch_size=config.batch_size)
        lines = _sample(
            sampler, folder, tasks, sampling, config.tries, config.seed, config.teacher, "teacher", console
        )
        _count(cost.teacher, lines)
    answers: dict[str, list[str]] = {i: [] for i in prompts}
    for line in lines:
        answers[line["question_id"]].append(line["answer"])
    return answers


def _sample(
    sampler, folder: Path, tasks, sampling: dict, n: int, seed: int, who: str, label: str, console
) -> list[dict]:
    made_by = model_digest(who) if Path(who).is_dir() else who
    config = {"model": made_by, "sampling": {**sampling, "stop": []}, "seed": seed, "tasks": digest(tasks)}
    return run_sampling(
        folder, tasks, n, config, sampler, sampling=sampling, seed=seed, label=label, console=console
    )


def _count(counter: Counter, lines: Sequence[dict]) -> None:
    counter["answers"] += len(lines)
    counter["completion_tokens"] += sum(line.get("tokens", 0) for line in lines)
    counter["prompt_tokens"] += sum(line.get("prompt_tokens", 0) for line in lines if line.get("index") == 0)
