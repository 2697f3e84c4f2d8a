"""Questions for staged answers: counts, sums, differences and comparisons whose rationale lists what was counted."""

import random
from collections.abc import Callable

from .problems import CONCLUSION, Problem, _relation, _two_colours
from .world import Scene


def plural(noun: str) -> str:
    return noun if noun == "scissors" else f"{noun}s"


def bars_of(scene: Scene) -> dict[str, int]:
    """Noun -> height of its bar, from left to right."""
    order = sorted(scene.objects, key=lambda item: item.cell[0])
    return {item.noun: sum(o.noun == item.noun for o in scene.objects) for item in order}


def _listed(scene: Scene, colour: str) -> tuple[str, int]:
    """`red: star, cup is 2.` and the number."""
    found = [item.noun for item in scene.objects if item.colour == colour]
    return f"{colour}: {', '.join(found) or 'nothing'} is {len(found)}.", len(found)


def _problem(question: str, steps: list[str], answer: str | int, kind: str) -> Problem:
    return Problem(question, str(answer), " ".join([*steps, CONCLUSION.format(answer)]), kind)


def count(scene: Scene, rng: random.Random) -> Problem:
    colour, _ = _two_colours(scene, rng)
    listed, number = _listed(scene, colour)
    return _problem(f"How many {colour} things are there?", [listed], number, "count")


def add(scene: Scene, rng: random.Random) -> Problem:
    one, two = _two_colours(scene, rng)
    (first, a), (second, b) = _listed(scene, one), _listed(scene, two)
    steps = [first, second, f"{a} plus {b} equals {a + b}."]
    return _problem(f"How many {one} plus {two} things are there?", steps, a + b, "add")


def subtract(scene: Scene, rng: random.Random) -> Problem:
    colour, _ = _two_colours(scene, rng)
    listed, number = _listed(scene, colour)
    total = len(scene.objects)
    steps = [
        f"things: {', '.join(scene.nouns)} is {total}.", listed, f"{total} minus {number} equals {total - number}."
    ]  # fmt: skip
    return _problem(f"How many things are left minus the {colour} things?", steps, total - number, "subtract")


def compare(scene: Scene, rng: random.Random) -> Problem:
    one, two = _two_colours(scene, rng)
    (first, a), (second, b) = _listed(scene, one), _listed(scene, two)
    answer = _relation(a, b)
    steps = [first, second, f"{a} is {answer} than {b}." if a != b else f"{a} is equal."]
    return _problem(f"Are there more or fewer {one} things than {two} things?", steps, answer, "compare")


def _two_bars(scene: Scene, rng: random.Random) -> tuple[str, str, str, int, int]:
    bars = bars_of(scene)
    one, two = rng.sample(list(bars), 2)
    cells = {noun: sorted(i.cell for i in scene.objects if i.noun == noun) for noun in (one, two)}
    read = " ".join(f"{noun}: {', '.join(cells[noun])} is {bars[noun]}." for noun in (one, two))
    return one, two, read, bars[one], bars[two]


def chart_add(scene: Scene, rng: random.Random) -> Problem:
    one, two, read, a, b = _two_bars(scene, rng)
    question = f"How many {plural(one)} plus {plural(two)} are there?"
    return _problem(question, [read, f"{a} plus {b} equals {a + b}."], a + b, "chart add")


def chart_compare(scene: Scene, rng: random.Random) -> Problem:
    one, two, read, a, b = _two_bars(scene, rng)
    answer = _relation(a, b)
    question = f"Are there more or fewer {plural(one)} than {plural(two)}?"
    step = f"{a} is {answer} than {b}." if a != b else f"{a} is equal."
    return _problem(question, [read, step], answer, "chart compare")


SCENE_KINDS: dict[str, Callable[[Scene, random.Random], Problem]] = {
    "count": count,
    "add": add,
    "subtract": subtract,
    "compare": compare,
}
CHART_KINDS: dict[str, Callable[[Scene, random.Random], Problem]] = {
    "chart add": chart_add,
    "chart compare": chart_compare,
}
KINDS = (*SCENE_KINDS, *CHART_KINDS)
