"""A warm-up file from any teacher: its rationales for some questions, those with the right answer."""

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ..endpoint import EndpointSettings
from ..errors import UserError
from ..graders import load_grader
from ..graders.prompts import load_prompts
from ..io import write_jsonl
from ..settings import setting

if TYPE_CHECKING:
    from ..teacher import EndpointClient


@dataclass(frozen=True)
class DistillConfig(EndpointSettings):
    """Settings of a distillation; each is an option of `vlm-sft-rl distill`."""

    dataset: str = setting(help="Data set whose prompts and grader are used, for example pocket or geoqa.")
    limit: int | None = setting(None, "Use only this many questions, drawn at random. Default: all.", least=1)
    n: int = setting(
        1,
        "Rationales asked for each question; the first right one is kept. Above 1, set a temperature.",
        least=1,
    )
    temperature: float = setting(0.0, "Sampling temperature of the teacher.", least=0)
    max_new_tokens: int = setting(384, "Longest rationale, in tokens.", least=1)
    seed: int = setting(0, "Seed of the questions drawn; it is also sent to the endpoint.")


def distill(
    questions: str | Path,
    target: str | Path,
    client: "EndpointClient",
    config: DistillConfig,
    *,
    image_root: str | Path | None = None,
    console: Console | None = None,
) -> dict[str, int]:
    """Ask the teacher, grade, and write question rows with a `rationale`; returns counts.

    Args:
        target: JSONL to write; the teacher's answers are kept beside it, so that nothing is asked (or paid) twice.

    Raises UserError: bad questions, an endpoint that does not answer, or no right rationale at all.
    """
    from .pool import grade_samples, read_questions
    from .sampling import EndpointSampler, refusals, run_sampling, task

    grader, prompts, target = load_grader(config.dataset), load_prompts(config.dataset), Path(target)
    rows = read_questions(questions, image_root, grader)
    if config.limit is not None and config.limit < len(rows):
        chosen = set(random.Random(config.seed).sample(range(len(rows)), config.limit))
        rows = [row for place, row in enumerate(rows) if place in chosen]
    sampling = {"temperature": config.temperature, "top_p": None, "top_k": None}
    sampling |= {"max_new_tokens": config.max_new_tokens, "stop": []}
    samples = run_sampling(
        target.with_suffix(".answers"),
        [task(row, prompts.ask(row)) for row in rows],
        config.n,
        {"teacher": client.model, "sampling": sampling, "seed": config.seed, "dataset": config.dataset},
        EndpointSampler(client, image_root),
        sampling=sampling,
        seed=config.seed,
        label="teacher",
        console=console,
    )
    graded = grade_samples(samples, rows, grader, round_=0)
    first: dict[str, str] = {}
    for candidate in graded:
        if candidate.right:
            first.setdefault(candidate.question, candidate.text.strip())
    counts = Counter(candidate.status for candidate in graded)
    if unanswered := len(refusals(samples)):
        counts["unanswered"] = unanswered
    if not first:
        raise UserError(
            f"None of {len(graded)} rationales has the right answer ({counts['unreadable']} have no readable one). Look at "
            f"{target.with_suffix('.answers')}: does the teacher see the images, and end with its answer?"
        )
    write_jsonl(target, [{**row, "rationale": first[row["id"]]} for row in rows if row["id"] in first])
    return {"questions": len(rows), "rationales": len(graded), "kept": len(first), **counts}
