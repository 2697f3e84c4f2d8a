"""Staged answers to the pocket world's questions, from exact ground truth: plan, what is in the image, steps, answer.

The first answer's caption is the captioner's own kind, which names what usually stands together. The answer after a check
asks of everything in question where it stands: what the model can rule out when asked, it leaves out of the count.
"""

import random
from pathlib import Path

from PIL import Image

from ..data.stages import Staged, format_staged
from .language import caption, named_nouns
from .problem_set import write_question_set
from .render import render
from .staged_problems import KINDS, Choice, ask
from .world import Scene, draw_scene

SIZES = {"warmup": 1200, "train": 1600, "val": 300, "test": 1500}
# warm-up pictures have the habits of the base's own training; all others are drawn without any
BIAS = {"warmup": 0.85}
CHECK = "Check again."  # what the user asks before a correction; words that the pocket tokenizer knows


def staged_answer(question: Choice, scene: Scene) -> Staged:
    """The exact staged answer: a caption of the whole picture, then a choice and what is known of it."""
    seen = caption(scene, named_nouns(scene, random.Random(0), 0.0))
    return _answer(question, seen, f"{question.answer} {question.found(scene)[question.answer]}.")


def checked_answer(question: Choice, scene: Scene) -> Staged:
    """The exact answer after a check, which looks each choice up in the picture and then takes the one that fits."""
    looked_up = question.found(scene)
    seen = ", ".join(f"{noun} {fact}" for noun, fact in looked_up.items())
    return _answer(question, f"Locate: {seen}.", f"{looked_up[question.answer]} {question.answer}.")


def _answer(question: Choice, seen: str, reasoning: str) -> Staged:
    return Staged(f"{', '.join(question.nouns)}.", seen, reasoning, question.answer)


def build_staged_set(folder: str | Path, *, seed: int = 0, sizes: dict[str, int] | None = None) -> Path:
    """Write a question file for every split and the pictures; a finished set stays as it is.

    A row has `answer`, the exact `staged` and `checked` answers, `category`, and the `scene` (ground truth). Every kind of
    question is equally frequent, no two questions share a picture.

    Raises:
        UserError: `folder` holds a set with other settings.
    """
    counts = {split: (sizes or {}).get(split, size) for split, size in SIZES.items()}
    manifest = {"format": 3, "seed": seed, "counts": counts}
    return write_question_set(Path(folder), "staged.json", manifest, KINDS, f"{seed}-staged", draw_staged)


def draw_staged(split: str, kind: str, name: str, path: str, rng: random.Random) -> tuple[Image.Image, dict]:
    """A picture and the row of a question of that kind about it."""
    scene = draw_scene(rng, BIAS.get(split, 0.0))
    picture, question = render(scene, rng.getrandbits(32)), ask(kind, scene, rng)
    staged, checked = staged_answer(question, scene), checked_answer(question, scene)
    return picture, {
        "id": name,
        "images": [path],
        "question": question.text,
        "answer": staged.conclusion,
        "category": kind,
        "staged": format_staged(staged),
        "checked": format_staged(checked),
        "scene": scene.to_json(),
    }
