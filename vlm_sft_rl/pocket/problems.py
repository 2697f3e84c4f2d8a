"""Questions that take several steps, each with its exact answer and an exact rationale: the world's school sums.

A rationale looks up what the question names, one thing after the other, and keeps the number as it goes: looking up is
what the pocket model does well, counting at a glance what it does badly.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .chart import value
from .world import Scene, draw_absent

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
    found = []
    for noun in nouns:
        item = scene.find(noun)
        number += step * (item is not None)
        found.append(f"{noun} {item.cell if item else 'nowhere'} {number}")
    return f"Locate: {', '.join(found)}.", number


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
    one, two = rng.sample(chart.objects, 2)
    a, b = value(one), value(two)
    return one.noun, two.noun, a, b, f"Locate: {one.noun} {one.cell} {a}, {two.noun} {two.cell} {b}."


def chart_add(chart: Scene, rng: random.Random) -> Problem:
    one, two, a, b, step = _read_off(chart, rng)
    steps = [step, f"{a} plus {b} equals {a + b}."]
    return _problem("chart add", f"How many are {one} plus {two}?", steps, a + b)


def chart_compare(chart: Scene, rng: random.Random) -> Problem:
    one, two, a, b, step = _read_off(chart, rng)
    question = f"Is {one} more or fewer than {two}?"
    return _problem("chart compare", question, [step, _compared(a, b)], _relation(a, b))


Kind = Callable[[Scene, random.Random], Problem]
SCENE_KINDS: dict[str, Kind] = {"count": count, "add": add, "subtract": subtract, "compare": compare}
CHART_KINDS: dict[str, Kind] = {"chart add": chart_add, "chart compare": chart_compare}
KINDS = (*SCENE_KINDS, *CHART_KINDS)
