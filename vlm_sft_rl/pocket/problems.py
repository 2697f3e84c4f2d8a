"""Questions that take several steps, each with its exact answer and an exact rationale: the world's school sums."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from .world import COLOURS, Scene

CONCLUSION = "So the answer is {}."
RELATIONS = ("more", "fewer", "equal")
Colours = tuple[str, str]  # what a question asks for; some use the first alone


@dataclass(frozen=True)
class Problem:
    """One question. `rationale` ends with the conclusion; `kind` names the operation."""

    question: str
    answer: str
    rationale: str
    kind: str


def two_colours(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Two different colours to ask for, in the picture if it has them."""
    present = sorted({item.colour for item in scene.objects})
    rng.shuffle(present)
    others = [colour for colour in COLOURS if colour not in present]
    rng.shuffle(others)
    if rng.random() < 0.15:  # now and then one that is not there
        present = [present[0], others[0], *present[1:]] if others else present
    first, second = (present + others)[:2]
    return (first, second) if rng.random() < 0.5 else (second, first)


def two_bars(chart: Scene, rng: random.Random) -> tuple[str, str]:
    """The colours of two of a chart's bars."""
    one, two = rng.sample(sorted({item.colour for item in chart.objects}), 2)
    return one, two


def _counted(scene: Scene, colour: str) -> tuple[str, int]:
    """`red 2.` and the number."""
    number = sum(item.colour == colour for item in scene.objects)
    return f"{colour} {number}.", number


def _counted_all(scene: Scene) -> tuple[str, int]:
    """`things 5.` and the number."""
    return f"things {len(scene.objects)}.", len(scene.objects)


def _problem(question: str, steps: list[str], answer: str | int, kind: str) -> Problem:
    return Problem(question, str(answer), " ".join([*steps, CONCLUSION.format(answer)]), kind)


def count(scene: Scene, colours: Colours) -> Problem:
    step, number = _counted(scene, colours[0])
    return _problem(f"How many {colours[0]} things are there?", [step], number, "count")


def add(scene: Scene, colours: Colours, kind: str = "add") -> Problem:
    one, two = colours
    (first, a), (second, b) = _counted(scene, one), _counted(scene, two)
    steps = [first, second, f"{a} plus {b} equals {a + b}."]
    return _problem(f"How many {one} plus {two} things are there?", steps, a + b, kind)


def subtract(scene: Scene, colours: Colours) -> Problem:
    step, number = _counted(scene, colours[0])
    everything, total = _counted_all(scene)
    steps = [everything, step, f"{total} minus {number} equals {total - number}."]
    question = f"How many things are left minus the {colours[0]} things?"
    return _problem(question, steps, total - number, "subtract")


def _relation(a: int, b: int) -> str:
    return RELATIONS[0] if a > b else RELATIONS[1] if a < b else RELATIONS[2]


def _compared(a: int, b: int) -> str:
    return f"{a} is {_relation(a, b)} than {b}." if a != b else f"{a} is equal."


def compare(scene: Scene, colours: Colours, kind: str = "compare") -> Problem:
    one, two = colours
    (first, a), (second, b) = _counted(scene, one), _counted(scene, two)
    question = f"Are there more or fewer {one} things than {two} things?"
    return _problem(question, [first, second, _compared(a, b)], _relation(a, b), kind)


SCENE_KINDS: dict[str, Callable[[Scene, Colours], Problem]] = {
    "count": count,
    "add": add,
    "subtract": subtract,
    "compare": compare,
}
CHART_KINDS: dict[str, Callable[[Scene, Colours], Problem]] = {
    "chart add": partial(add, kind="chart add"),
    "chart compare": partial(compare, kind="chart compare"),
}
KINDS = (*SCENE_KINDS, *CHART_KINDS)
