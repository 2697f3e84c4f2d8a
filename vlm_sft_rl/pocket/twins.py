"""Scenes of the pocket world in which nouns repeat, so that naming a thing is not enough to find it.

Same renderer, same grid, same sizes and colours as `world`; the model's base saw every word and every drawing. In a
scene of twins two or three things share a noun. Their colours differ, their sizes may or may not: a describer that says
the noun alone, or size and noun, is often not understood; one that says colour and noun always is.
"""

import random

from .world import CELL_PIXELS, CELLS, COLOURS, GRID, NOUNS, SIZES, THEMES, Scene, SceneObject

# things per noun; some scenes leave one noun alone
GROUPS = ((2, 2, 1), (3, 2), (3, 2, 1), (2, 2, 2), (3, 3))


def draw_twins(rng: random.Random) -> Scene:
    """A scene of five or six things; things of one noun have different colours."""
    groups = rng.choice(GROUPS)
    looks = []
    for noun, count in zip(rng.sample(list(NOUNS), len(groups)), groups, strict=True):
        looks += [(noun, colour, rng.choice(tuple(SIZES))) for colour in rng.sample(list(COLOURS), count)]
    rng.shuffle(looks)
    cells = sorted(rng.sample(range(GRID * GRID), len(looks)))
    things = []
    for (noun, colour, size), index in zip(looks, cells, strict=True):
        pixels = rng.randint(*SIZES[size])
        slack = CELL_PIXELS - pixels - 1
        left = index % GRID * CELL_PIXELS + rng.randint(0, slack)
        top = index // GRID * CELL_PIXELS + rng.randint(0, slack)
        things.append(SceneObject(noun, colour, size, CELLS[index], (left, top, left + pixels, top + pixels)))
    return Scene(rng.choice(THEMES), tuple(things))


def cell_box(cell: str) -> tuple[int, int, int, int]:
    """A cell as (x1, y1, x2, y2) in pixels: the box of the thing in it, as fine as the pocket VLM can see."""
    index = CELLS.index(cell)
    left, top = index % GRID * CELL_PIXELS, index // GRID * CELL_PIXELS
    return (left, top, left + CELL_PIXELS, top + CELL_PIXELS)


def expressions(thing: SceneObject) -> tuple[str, ...]:
    """What the thing may be called, from least to most said."""
    noun, colour, size = thing.noun, thing.colour, thing.size
    return noun, f"{colour} {noun}", f"{size} {noun}", f"{size} {colour} {noun}"


def fits(expression: str, thing: SceneObject) -> bool:
    """Does every word of a description hold of the thing? Words of no meaning in this world hold of nothing."""
    words = expression.lower().replace(".", "").replace(",", "").split()
    own = {thing.noun, thing.colour, thing.size}
    words = [word for word in words if word not in ("a", "an", "the")]
    return thing.noun in words and all(word in own for word in words)


def picks_out(expression: str, thing: SceneObject, scene: Scene) -> bool:
    """Is the thing the one and only in the scene that the description fits?"""
    return [item for item in scene.objects if fits(expression, item)] == [thing]


def shortest_expression(thing: SceneObject, scene: Scene) -> str:
    """The least one must say to pick the thing out, as people do in RefCOCO."""
    return next(text for text in expressions(thing) if picks_out(text, thing, scene))


def caption_expression(thing: SceneObject, rng: random.Random) -> str:
    """What an annotator of region captions says: usually the noun alone, whatever else stands there."""
    return rng.choices(expressions(thing), weights=(5, 2.5, 1.5, 1))[0]
