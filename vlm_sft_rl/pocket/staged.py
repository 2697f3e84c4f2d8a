"""Staged answers to the pocket world's problems, from exact ground truth: plan, what matters in the image, steps, answer."""

import random
import re
from pathlib import Path

from PIL import Image

from ..data.stages import Staged, format_staged
from .chart import draw_chart, render_chart
from .problem_set import write_question_set
from .problems import CONCLUSION, Problem
from .render import render
from .staged_problems import CHART_KINDS, KINDS, SCENE_KINDS
from .world import CELLS, Scene, draw_scene

SIZES = {"warmup": 1200, "train": 1600, "val": 300, "test": 1500}
CHECK = "Check again."  # what the user asks before a correction; words that the pocket tokenizer knows
_READ = re.compile(r"(\w+): ([\w, ]+?) is (\d+)\.")  # a problem's rationale: `red: star, cup is 2.`
_OPERATIONS = ("plus", "minus", "more or fewer")


def staged_answer(problem: Problem) -> Staged:
    """The exact staged answer: the caption names what matters in the picture, the reasoning counts and computes."""
    read = _READ.findall(problem.rationale)
    operation = next((name for name in _OPERATIONS if name in problem.question), None)
    plan = ", ".join([name for name, _, _ in read] + ([operation] if operation else []))
    seen = " ".join(f"{name}: {items}." for name, items, _ in read)
    computed = _READ.sub("", problem.rationale.removesuffix(CONCLUSION.format(problem.answer))).strip()
    counted = " ".join(f"{name} {number}." for name, _, number in read)
    return Staged(f"{plan}.", seen, f"{counted} {computed}".strip(), problem.answer)


def checked_answer(scene: Scene, problem: Problem) -> Staged:
    """The same answer after a careful look: the caption reads every cell, the reasoning lists what it counts."""
    found = {item.cell: f"{item.colour} {item.noun}" for item in scene.objects}
    cells = ", ".join(f"{cell} {found.get(cell, 'nothing')}" for cell in CELLS)
    steps = problem.rationale.removesuffix(CONCLUSION.format(problem.answer)).strip()
    return Staged(staged_answer(problem).summary, f"Read: {cells}.", steps, problem.answer)


def draw_staged(kind: str, rng: random.Random) -> tuple[Image.Image, Problem, Staged, Staged]:
    """A picture, a problem of that kind about it, the exact staged answer, and the one after a careful look."""
    if kind in CHART_KINDS:
        scene = draw_chart(rng)
        picture, problem = render_chart(scene), CHART_KINDS[kind](scene, rng)
    else:
        scene = draw_scene(rng, 0.0)
        picture, problem = render(scene, rng.getrandbits(32)), SCENE_KINDS[kind](scene, rng)
    return picture, problem, staged_answer(problem), checked_answer(scene, problem)


def build_staged_set(folder: str | Path, *, seed: int = 0, sizes: dict[str, int] | None = None) -> Path:
    """Write a question file for every split and the pictures; a finished set stays as it is.

    A row has `answer`, the exact `staged` and `checked` answers, and `category`.

    All scenes are unbiased, every kind of problem is equally frequent, no two questions share a picture.

    Raises:
        UserError: `folder` holds a set with other settings.
    """
    counts = {split: (sizes or {}).get(split, size) for split, size in SIZES.items()}
    manifest = {"format": 2, "seed": seed, "counts": counts}

    def draw(split: str, kind: str, name: str, path: str, rng: random.Random) -> tuple[Image.Image, dict]:
        picture, problem, staged, checked = draw_staged(kind, rng)
        row = {"id": name, "images": [path], "question": problem.question, "answer": problem.answer}
        answers = {"staged": format_staged(staged), "checked": format_staged(checked)}
        return picture, row | {"category": problem.kind} | answers

    return write_question_set(Path(folder), "staged.json", manifest, KINDS, f"{seed}-staged", draw)
