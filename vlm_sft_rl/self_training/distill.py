"""A warm-up file from any teacher: its rationales for some questions, those with the right answer."""

import random
from collections import Counter
from pathlib import Path

from rich.console import Console

from ..errors import UserError
from ..graders import load_grader
from ..graders.prompts import load_prompts
from ..io import write_jsonl
from ..teacher import EndpointClient
from .pool import grade_samples, read_questions
from .sampling import EndpointSampler, run_sampling, task


def distill(
    questions: str | Path,
    target: str | Path,
    client: EndpointClient,
    *,
    dataset: str,
    image_root: str | Path | None = None,
    limit: int | None = None,
    n: int = 1,
    temperature: float = 0.0,
    max_new_tokens: int = 384,
    seed: int = 0,
    console: Console | None = None,
) -> dict[str, int]:
    """Ask the teacher, grade, and write question rows with a `rationale`; returns counts.

    Args:
        target: JSONL to write; the teacher's answers are kept beside it, so that nothing is asked (or paid) twice.
        limit: only so many questions, drawn under the seed.
        n: rationales asked for each question; the first right one is taken. Above 1 set a temperature.

    Raises:
        UserError: bad questions, an endpoint that does not answer, or no right rationale at all.
    """
    grader, prompts, target = load_grader(dataset), load_prompts(dataset), Path(target)
    rows = read_questions(questions, image_root, grader)
    if limit is not None and limit < len(rows):
        chosen = set(random.Random(seed).sample(range(len(rows)), limit))
        rows = [row for place, row in enumerate(rows) if place in chosen]
    sampling = {"temperature": temperature, "top_p": None, "top_k": None}
    sampling |= {"max_new_tokens": max_new_tokens, "stop": []}
    samples = run_sampling(
        target.with_suffix(".answers"),
        [task(row, prompts.ask(row)) for row in rows],
        n,
        {"teacher": client.model, "sampling": sampling, "seed": seed, "dataset": dataset},
        EndpointSampler(client, image_root),
        sampling=sampling,
        seed=seed,
        label="teacher",
        console=console,
    )
    graded = grade_samples(samples, rows, grader, round_=0)
    first: dict[str, str] = {}
    for candidate in graded:
        if candidate.right:
            first.setdefault(candidate.question, candidate.text.strip())
    counts = Counter(candidate.status for candidate in graded)
    if not first:
        raise UserError(
            f"None of {len(graded)} rationales has the right answer ({counts['unreadable']} have no readable one). Look at "
            f"{target.with_suffix('.answers')}: does the teacher see the images, and end with its answer?"
        )
    write_jsonl(target, [{**row, "rationale": first[row["id"]]} for row in rows if row["id"] in first])
    return {"questions": len(rows), "rationales": len(graded), "kept": len(first), **counts}
