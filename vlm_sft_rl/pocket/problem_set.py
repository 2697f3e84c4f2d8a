"""Write problems to disk as question files: scenes and charts, exact answers, and rationales for a small warm-up."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image
from rich.progress import Progress

from ..errors import UserError
from ..io import read_json, write_json, write_jsonl
from .chart import draw_chart, render_chart
from .problems import CHART_KINDS, KINDS, SCENE_KINDS, Problem
from .render import render
from .world import draw_scene

Draw = Callable[[str, str, str, str, random.Random], tuple[Image.Image, dict]]
SIZES = {"warmup": 800, "train": 600, "test": 1500}


def build_problem_set(folder: str | Path, *, seed: int = 0, sizes: dict[str, int] | None = None) -> Path:
    """Write `warmup.jsonl` (with `rationale`), `train.jsonl`, `test.jsonl` and their images; complete folders stay.

    All scenes are unbiased; every kind of problem is equally frequent; no two questions share a picture.

    Raises:
        UserError: `folder` holds a set with other settings.
    """
    counts = {split: (sizes or {}).get(split, size) for split, size in SIZES.items()}
    manifest = {"format": 2, "seed": seed, "counts": counts}

    def draw(split: str, kind: str, name: str, path: str, rng: random.Random) -> tuple[Image.Image, dict]:
        picture, problem = draw_problem(kind, rng)
        return picture, question_row(name, path, problem, rationale=split == "warmup")

    return write_question_set(Path(folder), "problems.json", manifest, KINDS, str(seed), draw)


def write_question_set(
    folder: Path, name: str, manifest: dict, kinds: Sequence[str], stream: str, draw: Draw
) -> Path:
    """Write a question file for every split of `manifest["counts"]` and the pictures; a finished set stays as it is.

    Args:
        name: of the manifest's file, which is written last.
        kinds: taken in turn, so that each is equally frequent.
        stream: names the random streams, one for each split.
        draw: `(split, kind, id, image path, rng) -> (picture, row)`.

    Raises:
        UserError: `folder` holds a set with other settings.
    """
    done, counts = folder / name, manifest["counts"]
    if done.exists():
        if read_json(done) == manifest:
            return folder
        raise UserError(
            f"{done}: this folder holds a problem set with other settings. Choose another folder or delete it."
        )
    with Progress(transient=True) as progress:
        bar = progress.add_task("drawing problems", total=sum(counts.values()))
        for split, count in counts.items():
            rng = random.Random(f"{stream}-{split}")
            (folder / "images" / split).mkdir(parents=True, exist_ok=True)
            rows = []
            for number in range(count):
                row_id = f"{split}-{number:05d}"
                path = f"images/{split}/{row_id}.png"
                picture, row = draw(split, kinds[number % len(kinds)], row_id, path, rng)
                picture.save(folder / path)
                rows.append(row)
                progress.advance(bar)
            rng.shuffle(rows)
            write_jsonl(folder / f"{split}.jsonl", rows)
    write_json(done, manifest)
    return folder


def draw_problem(kind: str, rng: random.Random) -> tuple[Image.Image, Problem]:
    """A picture and a problem of that kind about it."""
    if kind in CHART_KINDS:
        chart = draw_chart(rng)
        return render_chart(chart), CHART_KINDS[kind](chart, rng)
    scene = draw_scene(rng, 0.0)
    return render(scene, rng.getrandbits(32)), SCENE_KINDS[kind](scene, rng)


def question_row(name: str, path: str, problem: Problem, *, rationale: bool) -> dict:
    row = {"id": name, "images": [path], "question": problem.question, "answer": problem.answer}
    return row | {"kind": problem.kind} | ({"rationale": problem.rationale} if rationale else {})
