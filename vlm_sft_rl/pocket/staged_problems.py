"""Questions for staged answers: counts, sums, differences and comparisons of what a caption names, with exact steps."""

from collections.abc import Callable, Sequence
from functools import partial

from .problems import (
    Colours,
    Problem,
    add,
    compare,
    count,
    make_problem,
    subtract,
)
from .world import Scene


def _listed(scene: Scene, colour: str) -> tuple[str, int]:
    """`red: star, cup is 2.` and the number."""
    found = [item.noun for item in scene.objects if item.colour == colour]
    return f"{colour}: {', '.join(found) or 'nothing'} is {len(found)}.", len(found)


def _listed_all(scene: Scene) -> tuple[str, int]:
    """`things: star, cup is 2.` and the number."""
    return f"things: {', '.join(scene.nouns)} is {len(scene.objects)}.", len(scene.objects)


def things(scene: Scene, colours: Colours) -> Problem:
    """How many things there are, of whatever colour."""
    step, number = _listed_all(scene)
    return make_problem("How many things are there?", [step], number, "things")


KINDS: dict[str, Callable[[Scene, Colours], Problem]] = {
    "things": things,
    "count": partial(count, counted=_listed),
    "add": partial(add, counted=_listed),
    "subtract": partial(subtract, counted=_listed, counted_all=_listed_all),
    "compare": partial(compare, counted=_listed),
}


def in_order(scene: Scene, nouns: Sequence[str]) -> Scene:
    """The scene with its objects in the order of `nouns`; those that are not named come last."""
    place = {noun: number for number, noun in reversed(list(enumerate(nouns)))}
    return Scene(scene.theme, tuple(sorted(scene.objects, key=lambda o: place.get(o.noun, len(nouns)))))
