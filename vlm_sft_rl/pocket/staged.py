"""Staged answers to the pocket world's problems, from exact ground truth: plan, what is in the image, steps, answer.

The first answer's caption is the captioner's own kind, which names what usually stands together. The answer after a check
asks of every thing that was named where it stands: what the model can rule out when asked, it leaves out of the count.
"""

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import Image

from ..data.stages import Staged, final_stages, format_staged
from ..evaluation.metrics.vocabulary import Vocabulary, mentions
from .language import caption, named_nouns
from .problem_set import write_question_set
from .problems import CONCLUSION, Colours, two_colours
from .render import render
from .staged_problems import KINDS, in_order
from .world import NOUNS, Scene, draw_scene, scene_from_json

SIZES = {"warmup": 1200, "train": 1600, "val": 300, "test": 1500}
# warm-up pictures have the habits of the base's own training; all others are drawn without any
BIAS = {"warmup": 0.85}
CHECK = "Check again."  # what the user asks before a correction; words that the pocket tokenizer knows
_OPERATIONS = ("plus", "minus", "more or fewer")


def staged_answer(kind: str, scene: Scene, colours: Colours) -> Staged:
    """The exact staged answer: a caption, then the colours of what it names, counts, and arithmetic."""
    named = named_nouns(scene, random.Random(0), 0.0)
    return _answer(kind, in_order(scene, named), colours, caption(scene, named))


def checked_answer(kind: str, scene: Scene, colours: Colours, named: Sequence[str]) -> Staged:
    """The exact answer after a check of what a first answer named.

    Args:
        named: the first answer's nouns. Each is located, absent ones as `nowhere`; what was left out follows.
    """
    order = list(dict.fromkeys(named))
    order += [noun for noun in scene.nouns if noun not in order]
    cells = {item.noun: item.cell for item in scene.objects}
    located = ", ".join(f"{noun} {cells.get(noun, 'nowhere')}" for noun in order)
    return _answer(kind, in_order(scene, order), colours, f"Locate: {located}.")


def _answer(kind: str, scene: Scene, colours: Colours, seen: str) -> Staged:
    problem = KINDS[kind](scene, colours)
    operation = next((name for name in _OPERATIONS if name in problem.question), None)
    asked = [colour for colour in colours if f" {colour} " in problem.question]
    plan = ", ".join(asked + ([operation] if operation else []) or ["things"])
    steps = problem.rationale.removesuffix(CONCLUSION.format(problem.answer)).strip()
    if asked:
        steps = f"{', '.join(f'{item.noun} {item.colour}' for item in scene.objects)}. {steps}"
    return Staged(f"{plan}.", seen, steps, problem.answer)


@cache
def _vocabulary() -> Vocabulary:
    return Vocabulary.build(list(NOUNS))


def check_attempt(question: dict, attempt: str) -> str:
    """The exact checked answer to an attempt, from a question's ground truth: a teacher who knows the picture."""
    seen = final_stages(attempt).get("CAPTION", "")
    named = [mention.noun for mention in mentions(seen, _vocabulary())]
    scene, colours = scene_from_json(question["scene"]), tuple(question["colours"])
    return format_staged(checked_answer(question["category"], scene, colours, named))


def build_staged_set(folder: str | Path, *, seed: int = 0, sizes: dict[str, int] | None = None) -> Path:
    """Write a question file for every split and the pictures; a finished set stays as it is.

    A row has `answer`, the exact `staged` answer, the one `checked` without a first attempt, `category`, and the ground
    truth (`scene`, `colours`). Every kind of problem is equally frequent, no two questions share a picture.

    Raises:
        UserError: `folder` holds a set with other settings.
    """
    counts = {split: (sizes or {}).get(split, size) for split, size in SIZES.items()}
    manifest = {"format": 3, "seed": seed, "counts": counts}
    return write_question_set(
        Path(folder), "staged.json", manifest, tuple(KINDS), f"{seed}-staged", draw_staged
    )


def draw_staged(
    split: str, kind: str, name: str, path: str, rng: random.Random
) -> tuple[Image.Image, dict]:
    """A picture and the row of a question of that kind about it."""
    scene = draw_scene(rng, BIAS.get(split, 0.0))
    picture, colours = render(scene, rng.getrandbits(32)), two_colours(scene, rng)
    problem = KINDS[kind](scene, colours)
    return picture, {
        "id": name,
        "images": [path],
        "question": problem.question,
        "answer": problem.answer,
        "category": kind,
        "staged": format_staged(staged_answer(kind, scene, colours)),
        "checked": format_staged(checked_answer(kind, scene, colours, ())),
        "scene": scene.to_json(),
        "colours": list(colours),
    }
