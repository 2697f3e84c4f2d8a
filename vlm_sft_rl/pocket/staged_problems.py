"""Questions for staged answers: counts, sums, differences and comparisons whose rationale lists what was counted."""

import random
from collections.abc import Callable
from functools import partial

from .problems import Problem, add, compare, compared, count, make_problem, relation, subtract
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


def _listed_all(scene: Scene) -> tuple[str, int]:
    """`things: star, cup is 2.` and the number."""
    return f"things: {', '.join(scene.nouns)} is {len(scene.objects)}.", len(scene.objects)


def _two_bars(scene: Scene, rng: random.Random) -> tuple[str, str, str, int, int]:
    bars = bars_of(scene)
    one, two = rng.sample(list(bars), 2)
    cells = {noun: sorted(i.cell for i in scene.objects if i.noun == noun) for noun in (one, two)}
    read = " ".join(f"{noun}: {', '.join(cells[noun])} is {bars[noun]}." for noun in (one, two))
    return one, two, read, bars[one], bars[two]


def chart_add(scene: Scene, rng: random.Random) -> Problem:
    one, two, read, a, b = _two_bars(scene, rng)
    question = f"How many {plural(one)} plus {plural(two)} are there?"
    return make_problem(question, [read, f"{a} plus {b} equals {a + b}."], a + b, "chart add")


def chart_compare(scene: Scene, rng: random.Random) -> Problem:
    one, two, read, a, b = _two_bars(scene, rng)
    question = f"Are there more or fewer {plural(one)} than {plural(two)}?"
    return make_problem(question, [read, compared(a, b)], relation(a, b), "chart compare")


SCENE_KINDS: dict[str, Callable[[Scene, random.Random], Problem]] = {
    "count": partial(count, counted=_listed),
    "add": partial(add, counted=_listed),
    "subtract": partial(subtract, counted=_listed, counted_all=_listed_all),
    "compare": partial(compare, counted=_listed),
}
CHART_KINDS: dict[str, Callable[[Scene, random.Random], Problem]] = {
    "chart add": chart_add,
    "chart compare": chart_compare,
}
KINDS = (*SCENE_KINDS, *CHART_KINDS)
