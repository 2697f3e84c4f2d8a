"""Questions that take several steps, each with its exact answer and an exact rationale: the world's school sums.

A rationale looks up what the question names, one thing after the other, and keeps the number as it goes: looking up is
what the pocket model does well, counting at a glance what it does badly.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..data.stages import Staged, format_staged
from ..io import write_json, write_jsonl
from .dataset import draw_splits, is_complete
from .language import caption, named_nouns
from .render import draw_chart, render, render_chart, value
from .world import Scene, draw_absent, draw_scene

CONCLUSION = "So the answer is {}."
RELATIONS = ("more", "fewer", "equal")


@dataclass(frozen=True)
class Problem:
    """One question. `rationale` ends with the conclusion; `kind` names the operation."""

    question: str
    answer: str
    rationale: str
    kind: str


def _problem(kind: str, question: str, steps: Sequence[str], answer: str | int) -> Problem:
    return Problem(question, str(answer), " ".join([*steps, CONCLUSION.format(answer)]), kind)


def named_things(scene: Scene, rng: random.Random, number: int, least: int = 1) -> list[str]:
    """`number` nouns to ask for, at least `least` of them in the picture; the others often belong to what is there."""
    there = rng.sample(scene.nouns, min(len(scene.nouns), rng.randint(least, number)))
    nouns = list(there)
    while len(nouns) < number:
        nouns.append(draw_absent(rng, {*scene.nouns, *nouns}, 0.5))
    rng.shuffle(nouns)
    return nouns


def _look_up(scene: Scene, nouns: Sequence[str], number: int = 0, step: int = 1) -> tuple[str, int]:
    """`Locate: sun z2 1, cloud nowhere 1.`: where each thing is and the number so far; and the number at the end."""
    places = []
    for noun in nouns:
        item = scene.find(noun)
        number += step * (item is not None)
        places.append(f"{noun} {item.cell if item else 'nowhere'} {number}")
    return f"Locate: {', '.join(places)}.", number


def count(scene: Scene, rng: random.Random) -> Problem:
    nouns = named_things(scene, rng, rng.randint(3, 4))
    step, number = _look_up(scene, nouns)
    return _problem("count", f"How many are there: {', '.join(nouns)}?", [step], number)


def add(scene: Scene, rng: random.Random) -> Problem:
    start, nouns = rng.randint(1, 4), named_things(scene, rng, rng.randint(3, 4))
    step, number = _look_up(scene, nouns, start)
    return _problem("add", f"How many are {start} plus: {', '.join(nouns)}?", [step], number)


def subtract(scene: Scene, rng: random.Random) -> Problem:
    start, nouns = rng.randint(5, 8), named_things(scene, rng, rng.randint(3, 4))
    step, number = _look_up(scene, nouns, start, -1)
    return _problem("subtract", f"How many are {start} minus: {', '.join(nouns)}?", [step], number)


def compare(scene: Scene, rng: random.Random) -> Problem:
    nouns = named_things(scene, rng, 4, least=0)
    (first, a), (second, b) = _look_up(scene, nouns[:2]), _look_up(scene, nouns[2:])
    question = f"Are there more or fewer {', '.join(nouns[:2])} than {', '.join(nouns[2:])}?"
    return _problem("compare", question, [first, second, _compared(a, b)], _relation(a, b))


def _relation(a: int, b: int) -> str:
    return RELATIONS[0] if a > b else RELATIONS[1] if a < b else RELATIONS[2]


def _compared(a: int, b: int) -> str:
    return f"{a} equals {b}." if a == b else f"{a} is {_relation(a, b)} than {b}."


def _read_off(chart: Scene, rng: random.Random) -> tuple[str, str, int, int, str]:
    """Two of a chart's things, their values, and the step that reads them: `Locate: cup x3 2, star w1 4.`"""
    first, second = rng.sample(chart.objects, 2)
    a, b = value(first), value(second)
    step = f"Locate: {first.noun} {first.cell} {a}, {second.noun} {second.cell} {b}."
    return first.noun, second.noun, a, b, step


def chart_add(chart: Scene, rng: random.Random) -> Problem:
    first, second, a, b, step = _read_off(chart, rng)
    steps = [step, f"{a} plus {b} equals {a + b}."]
    return _problem("chart add", f"How many are {first} plus {second}?", steps, a + b)


def chart_compare(chart: Scene, rng: random.Random) -> Problem:
    first, second, a, b, step = _read_off(chart, rng)
    question = f"Is {first} more or fewer than {second}?"
    return _problem("chart compare", question, [step, _compared(a, b)], _relation(a, b))


Kind = Callable[[Scene, random.Random], Problem]
SCENE_KINDS: dict[str, Kind] = {"count": count, "add": add, "subtract": subtract, "compare": compare}
CHART_KINDS: dict[str, Kind] = {"chart add": chart_add, "chart compare": chart_compare}
KINDS = (*SCENE_KINDS, *CHART_KINDS)


# Write problems to disk as question files: scenes and charts, exact answers, and rationales for a small warm-up.
Draw = Callable[[str, str, str, str, random.Random], tuple[Image.Image, dict]]
SIZES = {"warmup": 800, "train": 600, "test": 1500}


def build_problem_set(folder: str | Path, *, seed: int = 0, sizes: dict[str, int] | None = None) -> Path:
    """Write `warmup.jsonl` (with `rationale`), `train.jsonl`, `test.jsonl` and their images; complete folders stay.

    All scenes are unbiased; every kind of problem is equally frequent; no two questions share a picture.

    Raises UserError: `folder` holds a set with other settings.
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
        name: of the manifest's file.
        kinds: taken in turn, so that each is equally frequent.
        stream: names the random streams, one for each split.
        draw: `(split, kind, id, image path, rng) -> (picture, row)`.

    Raises UserError: `folder` holds a set with other settings.
    """
    if is_complete(folder / name, manifest):
        return folder
    for split, rng, places in draw_splits(folder, manifest["counts"], stream, "drawing problems"):
        rows = []
        for number, (row_id, path) in enumerate(places):
            picture, row = draw(split, kinds[number % len(kinds)], row_id, path, rng)
            picture.save(folder / path)
            rows.append(row)
        rng.shuffle(rows)
        write_jsonl(folder / f"{split}.jsonl", rows)
    write_json(folder / name, manifest)
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


# Questions with a choice of things by name, for staged answers: which one is there, is not, or has a colour.
CHOICE_KINDS = ("there", "nowhere", "colour")


@dataclass(frozen=True)
class Choice:
    """One question: which of the `nouns`; exactly one, `answer`, fits. `colour`: of the kind that asks for one."""

    kind: str
    nouns: tuple[str, ...]
    answer: str
    colour: str | None = None

    @property
    def text(self) -> str:
        property_ = self.colour if self.kind == "colour" else self.kind
        return f"Which is {property_}: {', '.join(self.nouns)}?"

    def facts(self, scene: Scene) -> dict[str, str]:
        """Noun -> what the question wants to know of it: `there` or its colour, and `nowhere` where it is absent."""
        known = {item.noun: item.colour if self.kind == "colour" else "there" for item in scene.objects}
        return {noun: known.get(noun, "nowhere") for noun in self.nouns}


def ask(kind: str, scene: Scene, rng: random.Random) -> Choice:
    """A question with three to five choices; those that are not in the picture often belong to what is there."""
    number = rng.randint(3, 5)
    objects = rng.sample(scene.objects, len(scene.objects))
    if kind == "there":
        present, colour = objects[:1], None
    elif kind == "nowhere":
        present, colour = objects[: number - 1], None
    else:
        colour = objects[0].colour
        others = [item for item in objects[1:] if item.colour != colour]
        present = [objects[0], *others[: rng.randint(1, number - 1)]]
    absent = 1 if kind == "nowhere" else number - len(present)
    nouns = [item.noun for item in present]
    for _ in range(absent):
        nouns.append(draw_absent(rng, {*scene.nouns, *nouns}, 0.5))
    answer = nouns[-1] if kind == "nowhere" else nouns[0]
    rng.shuffle(nouns)
    return Choice(kind, tuple(nouns), answer, colour)


# Staged answers to the pocket world's questions, from exact ground truth: plan, what is in the image, steps, answer.
STAGED_SIZES = {"warmup": 1200, "train": 1600, "val": 300, "test": 1500}
# warm-up pictures have the habits of the base's own training; all others are drawn without any
BIAS = {"warmup": 0.85}
CHECK = "Check again."  # what the user asks before a correction; words that the pocket tokenizer knows


def staged_answer(question: Choice, scene: Scene) -> Staged:
    """The exact staged answer: a caption of the whole picture, then a choice and what is known of it."""
    seen = caption(scene, named_nouns(scene, random.Random(0), 0.0))
    return _answer(question, seen, f"{question.answer} {question.facts(scene)[question.answer]}.")


def checked_answer(question: Choice, scene: Scene) -> Staged:
    """The exact answer after a check, which looks each choice up in the picture and then takes the one that fits."""
    looked_up = question.facts(scene)
    seen = ", ".join(f"{noun} {fact}" for noun, fact in looked_up.items())
    return _answer(question, f"Locate: {seen}.", f"{looked_up[question.answer]} {question.answer}.")


def _answer(question: Choice, seen: str, reasoning: str) -> Staged:
    return Staged(f"{', '.join(question.nouns)}.", seen, reasoning, question.answer)


def build_staged_set(folder: str | Path, *, seed: int = 0, sizes: dict[str, int] | None = None) -> Path:
    """Write a question file for every split and the pictures; a finished set stays as it is.

    A row has `answer`, the exact `staged` and `checked` answers, `category`, and the `scene` (ground truth). Every kind of
    question is equally frequent, no two questions share a picture.

    Raises UserError: `folder` holds a set with other settings.
    """
    counts = {split: (sizes or {}).get(split, size) for split, size in STAGED_SIZES.items()}
    manifest = {"format": 3, "seed": seed, "counts": counts}
    return write_question_set(
        Path(folder), "staged.json", manifest, CHOICE_KINDS, f"{seed}-staged", draw_staged
    )


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
