"""Questions that take several steps, each with its exact answer and an exact rationale: the world's school sums."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from .world import COLOURS, Scene

CONCLUSION = "So the answer is {}."
RELATIONS = ("more", "fewer", "equal")
# how a rationale counts: a colour's things, or all things -> the step, and the number
Counted = Callable[[Scene, str], tuple[str, int]]
CountedAll = Callable[[Scene], tuple[str, int]]


@dataclass(frozen=True)
class Problem:
    """One question. `rationale` ends with the conclusion; `kind` names the operation."""

    question: str
    answer: str
    rationale: str
    kind: str


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


def _counted(scene: Scene, colour: str) -> tuple[str, int]:
    """`red 2.` and the number."""
    number = sum(item.colour == colour for item in scene.objects)
    return f"{colour} {number}.", number


def _counted_all(scene: Scene) -> tuple[str, int]:
    """`things 5.` and the number."""
    return f"things {len(scene.objects)}.", len(scene.objects)


def make_problem(question: str, steps: list[str], answer: str | int, kind: str) -> Problem:
    return Problem(question, str(answer), " ".join([*steps, CONCLUSION.format(answer)]), kind)


def count(scene: Scene, rng: random.Random, counted: Counted = _counted) -> Problem:
    colour, _ = _two_colours(scene, rng)
    step, number = counted(scene, colour)
    return make_problem(f"How many {colour} things are there?", [step], number, "count")


def add(scene: Scene, rng: random.Random, counted: Counted = _counted) -> Problem:
    one, two = _two_colours(scene, rng)
    (first, a), (second, b) = counted(scene, one), counted(scene, two)
    steps = [first, second, f"{a} plus {b} equals {a + b}."]
    return make_problem(f"How many {one} plus {two} things are there?", steps, a + b, "add")


def subtract(
    scene: Scene, rng: random.Random, counted: Counted = _counted, counted_all: CountedAll = _counted_all
) -> Problem:
    colour, _ = _two_colours(scene, rng)
    step, number = counted(scene, colour)
    everything, total = counted_all(scene)
    steps = [everything, step, f"{total} minus {number} equals {total - number}."]
    return make_problem(
        f"How many things are left minus the {colour} things?", steps, total - number, "subtract"
    )


def relation(a: int, b: int) -> str:
    return RELATIONS[0] if a > b else RELATIONS[1] if a < b else RELATIONS[2]


def compared(a: int, b: int) -> str:
    return f"{a} is {relation(a, b)} than {b}." if a != b else f"{a} is equal."


def compare(scene: Scene, rng: random.Random, counted: Counted = _counted) -> Problem:
    one, two = _two_colours(scene, rng)
    (first, a), (second, b) = counted(scene, one), counted(scene, two)
    answer = relation(a, b)
    steps = [first, second, compared(a, b)]
    return make_problem(f"Are there more or fewer {one} things than {two} things?", steps, answer, "compare")


def _two_bars(scene: Scene, rng: random.Random) -> tuple[str, str, list[str], int, int]:
    """Two colours of a chart's bars, the steps that read them off, and their heights."""
    one, two = rng.sample(sorted({item.colour for item in scene.objects}), 2)
    (first, a), (second, b) = _counted(scene, one), _counted(scene, two)
    return one, two, [first, second], a, b


def chart_add(scene: Scene, rng: random.Random) -> Problem:
    one, two, steps, a, b = _two_bars(scene, rng)
    question = f"How many {one} plus {two} things are there?"
    return make_problem(question, [*steps, f"{a} plus {b} equals {a + b}."], a + b, "chart add")


def chart_compare(scene: Scene, rng: random.Random) -> Problem:
    one, two, steps, a, b = _two_bars(scene, rng)
    answer = relation(a, b)
    question = f"Are there more or fewer {one} things than {two} things?"
    return make_problem(question, [*steps, compared(a, b)], answer, "chart compare")


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
