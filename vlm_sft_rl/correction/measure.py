"""Answers with their correction turns on a set of questions: samples.jsonl in a folder, resumable; and their grades."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from ..data.images import open_image
from ..evaluation.turns import TurnGrades, grade_turns
from ..graders import load_grader
from ..runs import BATCHES_PER_CALL, Engine, answer_all, claim, digest, model_digest


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

    config = CorrectionConfig(**settings)

    def load() -> Engine:
        loaded = load_for_inference(model, device)[:2]

        def answer(part: Sequence[dict]) -> Iterator[list[dict]]:
            answers = generate_corrected(
                *loaded,
                [[open_image(name, image_root) for name in q["images"]] or None for q in part],
                [q["question"] for q in part],
                config,
                ids=[q["id"] for q in part],
                batch_size=batch_size,
            )
            yield [_sample(question, answer) for question, answer in zip(part, answers, strict=True)]

        return answer

    manifest = {
        "model": model_digest(model),
        "decoding": asdict(config),
        "questions": digest(list(questions)),
    }
    run = claim(folder, manifest)
    return answer_all(run, questions, load, per_call=BATCHES_PER_CALL * batch_size, console=console).lines


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
    grades = {}
    for sample in samples:
        question = {"id": sample["id"], "question": sample["prompt"], **sample["reference"]}
        turns = [event for event in sample["trace"] if event.get("kind") == "turn"]
        grades[sample["id"]] = grade_turns(judge, turns, question, staged=staged)
    return grades
