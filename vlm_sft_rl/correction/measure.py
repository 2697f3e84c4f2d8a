"""Answers with their correction turns on a set of questions: samples.jsonl in a folder, resumable; and their grades."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..data.images import open_image
from ..evaluation.samples import SAMPLES, collect, cut_broken_end, merge
from ..evaluation.turns import TurnGrades, grade_turns
from ..graders import load_grader
from ..io import append_jsonl
from ..runs import claim, model_digest
from ..self_training.stages import digest

CALLS_PER_BATCH = 4


def measure_corrections(
    model: str | Path,
    questions: Sequence[dict],
    folder: str | Path,
    settings: dict,
    *,
    image_root: str | Path | None = None,
    batch_size: int = 16,
    device: str | None = None,
    console: Console | None = None,
) -> list[dict]:
    """Answer and correct; returns the samples in the order of `questions`. A folder never mixes two settings.

    Args:
        questions: rows with `id`, `images`, `question`; the whole row is kept as the sample's `reference`.
        settings: fields of `decoding.CorrectionConfig`.

    Raises:
        UserError: `folder` belongs to another model, other questions or settings; the disk is full.
    """
    from ..decoding import CorrectionConfig, generate_corrected
    from ..models.load import load_for_inference

    folder, config = Path(folder), CorrectionConfig(**settings)
    made_of = {"model": model_digest(model), "decoding": asdict(config), "questions": digest(list(questions))}
    claim(folder, made_of)
    cut_broken_end(folder / SAMPLES)
    found = collect(folder)
    todo = [q for q in questions if q["id"] not in found]
    if todo:
        loaded = load_for_inference(model, device)[:2]
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console or Console(), transient=True) as progress:
            bar = progress.add_task("answers", total=len(todo))
            per_call = CALLS_PER_BATCH * batch_size
            for start in range(0, len(todo), per_call):
                part = todo[start : start + per_call]
                images = [[open_image(name, image_root) for name in q["images"]] or None for q in part]
                answers = generate_corrected(
                    *loaded,
                    images,
                    [q["question"] for q in part],
                    config,
                    ids=[q["id"] for q in part],
                    batch_size=batch_size,
                )
                append_jsonl(folder / SAMPLES, map(_sample, part, answers))
                progress.advance(bar, len(part))
    return merge(folder, [q["id"] for q in questions], collect(folder))


def _sample(question: dict, answer) -> dict:
    return {
        "id": question["id"],
        "images": question["images"],
        "prompt": question["question"],
        "answer": answer.text,
        "ok": answer.ok,
        "counts": asdict(answer.counts),
        "trace": answer.trace,
        "reference": {k: v for k, v in question.items() if k not in ("id", "images", "question")},
    }


def grades_of(samples: Iterable[dict], grader: str, *, staged: bool = True) -> dict[str, TurnGrades]:
    """The grades of every turn, by question id."""
    judge = load_grader(grader)
    found = {}
    for sample in samples:
        question = {"id": sample["id"], "question": sample["prompt"], **sample["reference"]}
        turns = [event for event in sample["trace"] if event.get("kind") == "turn"]
        found[sample["id"]] = grade_turns(judge, turns, question, staged=staged)
    return found
