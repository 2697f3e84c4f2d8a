"""Questions that take several steps, each with its exact answer and an exact rationale: the world's school sums."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from .chart import bars_of
from .world import COLOURS, Scene

CONCLUSION = "So the answer is {}."
RELATIONS = ("more", "fewer", "equal")


@dataclass(frozen=True)
class Problem:
    """One question. `rationale` ends with the conclusion; `kind` names the operation."""

    question: str
    answer: str
    rationale: str
    kind: str


def plural(noun: str) -> str:
    return noun if noun == "scissors" else f"{noun}s"


def _two_colours(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Two different colours, in the picture if it has them."""
    present = sorted({item.colour for item in scene.objects})
    rng.shuffle(present)
    others = [colour for colour in COLOURS if colour not in present]
    rng.shuffle(others)
    if rng.random() < 0.15:  # now and then one that is not there
        present = [present[0], others[0], *present[1:]] if others else present
    first, second = (present + others)[:2]
    return (first, second) if rng.random() < 0.5 else (second, first)


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


def _relation(a: int, b: int) -> str:
    return RELATIONS[0] if a > b else RELATIONS[1] if a < b else RELATIONS[2]


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
