"""Scenes of the pocket world: what may stand in a picture, how often, and where.

A scene is a background and three to six objects, each in a cell of its own on a 4x4 grid. Some nouns go together
(`COMPANIONS`): in *biased* scenes the partner stands there too most of the time, in *unbiased* scenes nouns are drawn
independently. A captioner trained on biased scenes learns to name the partner unseen, which is how co-occurrence makes
large VLMs hallucinate (a keyboard, therefore a mouse).
"""

import random
from collections.abc import Collection
from dataclasses import asdict, dataclass

GRID = 4
CELL_PIXELS = 32
IMAGE_PIXELS = GRID * CELL_PIXELS
CELLS = tuple(f"{column}{row}" for row in range(1, GRID + 1) for column in "wxyz")

# noun -> code point of its symbol in the DejaVu Sans font, which matplotlib ships
NOUNS = {
    "anchor": 0x2693,
    "atom": 0x269B,
    "bolt": 0x26A1,
    "castle": 0x265C,
    "cat": 0x1F431,
    "cloud": 0x2601,
    "clover": 0x2618,
    "cow": 0x1F42E,
    "crown": 0x265B,
    "cup": 0x2615,
    "die": 0x2685,
    "envelope": 0x2709,
    "flag": 0x2691,
    "flask": 0x2697,
    "flower": 0x273F,
    "gear": 0x2699,
    "hammer": 0x2692,
    "heart": 0x2665,
    "horse": 0x265E,
    "keyboard": 0x2328,
    "moon": 0x263E,
    "mouse": 0x1F42D,
    "note": 0x266B,
    "pencil": 0x270E,
    "phone": 0x260E,
    "plane": 0x2708,
    "scale": 0x2696,
    "scissors": 0x2702,
    "skull": 0x2620,
    "snowflake": 0x2744,
    "snowman": 0x2603,
    "star": 0x2605,
    "sun": 0x2600,
    "sword": 0x2694,
    "umbrella": 0x2602,
    "wheel": 0x2638,
}
COMPANIONS = {
    "anchor": "wheel",
    "castle": "crown",
    "flask": "atom",
    "flower": "clover",
    "hammer": "gear",
    "horse": "sword",
    "keyboard": "mouse",
    "moon": "star",
    "pencil": "scissors",
    "phone": "envelope",
    "snowman": "snowflake",
    "sun": "cloud",
}
COLOURS = {
    "red": (205, 32, 40),
    "blue": (28, 70, 210),
    "green": (16, 124, 52),
    "purple": (136, 36, 168),
    "orange": (232, 112, 8),
    "black": (34, 34, 38),
}
SIZES = {"small": (19, 22), "large": (26, 29)}
THEMES = ("beach", "desert", "meadow", "room", "snow")


@dataclass(frozen=True)
class SceneObject:
    """One object. `box` is (x0, y0, x1, y1) in pixels, the symbol's target square; `cell` is `w1` (top left) … `z4`."""

    noun: str
    colour: str
    size: str
    cell: str
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    theme: str
    objects: tuple[SceneObject, ...]

    @property
    def nouns(self) -> tuple[str, ...]:
        """Nouns in reading order (row by row)."""
        return tuple(item.noun for item in self.objects)

    def find(self, noun: str) -> SceneObject | None:
        return next((item for item in self.objects if item.noun == noun), None)

    def to_json(self) -> dict:
        return {
            "theme": self.theme,
            "objects": [asdict(item) | {"box": list(item.box)} for item in self.objects],
        }


def scene_from_json(row: dict) -> Scene:
    return Scene(
        row["theme"], tuple(SceneObject(**(item | {"box": tuple(item["box"])})) for item in row["objects"])
    )


def draw_nouns(rng: random.Random, count: int, bias: float) -> list[str]:
    """Draw `count` distinct nouns; with probability `bias` the companion of a drawn noun is drawn next.

    `bias = 0` gives independent nouns (test scenes).
    """
    chosen: list[str] = []
    while len(chosen) < count:
        noun = rng.choice([name for name in NOUNS if name not in chosen])
        chosen.append(noun)
        partner = COMPANIONS.get(noun)
        if partner and partner not in chosen and len(chosen) < count and rng.random() < bias:
            chosen.append(partner)
    return chosen


def draw_scene(rng: random.Random, bias: float, counts: tuple[int, int] = (3, 6)) -> Scene:
    """Draw one scene with `counts[0]` to `counts[1]` objects."""
    nouns = draw_nouns(rng, rng.randint(*counts), bias)
    cells = sorted(rng.sample(range(GRID * GRID), len(nouns)))
    rng.shuffle(nouns)
    objects = []
    for noun, index in zip(nouns, cells, strict=True):
        size = rng.choice(tuple(SIZES))
        pixels = rng.randint(*SIZES[size])
        box = _place(rng, index, pixels)
        colour = rng.choice(tuple(COLOURS))
        objects.append(SceneObject(noun, colour, size, CELLS[index], box))
    return Scene(rng.choice(THEMES), tuple(objects))


def _place(rng: random.Random, index: int, pixels: int) -> tuple[int, int, int, int]:
    """The box of a symbol of that many pixels, anywhere in its cell."""
    slack = CELL_PIXELS - pixels - 1
    left = index % GRID * CELL_PIXELS + rng.randint(0, slack)
    top = index // GRID * CELL_PIXELS + rng.randint(0, slack)
    return left, top, left + pixels, top + pixels


def absent_weights(present: Collection[str], bias: float) -> dict[str, float]:
    """Probability of every noun that is not `present`, as likely as the scene generator makes it beside those that are.

    Missing companions of present nouns share the probability `bias`, all absent nouns share the rest. A verifier that
    is trained on negatives drawn so cannot tell them by the company they keep and has to look at the picture.
    """
    absent = [noun for noun in NOUNS if noun not in present]
    partners = sorted({COMPANIONS[noun] for noun in present if noun in COMPANIONS} - set(present))
    share = bias if partners else 0.0
    weights = {noun: (1 - share) / len(absent) for noun in absent}
    for noun in partners:
        weights[noun] += share / len(partners)
    return weights


def draw_absent(rng: random.Random, present: Collection[str], bias: float) -> str:
    """Draw a noun that is not `present`, with `absent_weights`."""
    weights = absent_weights(present, bias)
    return rng.choices(list(weights), list(weights.values()))[0]


# Scenes of the pocket world in which nouns repeat, so that naming a thing is not enough to find it.
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
        things.append(SceneObject(noun, colour, size, CELLS[index], _place(rng, index, pixels)))
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
    words = [word for word in words if word not in ("a", "an", "the")]
    return thing.noun in words and set(words) <= {thing.noun, thing.colour, thing.size}


def picks_out(expression: str, thing: SceneObject, scene: Scene) -> bool:
    """Is the thing the one and only in the scene that the description fits?"""
    return [item for item in scene.objects if fits(expression, item)] == [thing]


def shortest_expression(thing: SceneObject, scene: Scene) -> str:
    """The least one must say to pick the thing out, as people do in RefCOCO."""
    return next(text for text in expressions(thing) if picks_out(text, thing, scene))


def caption_expression(thing: SceneObject, rng: random.Random) -> str:
    """What an annotator of region captions says: usually the noun alone, whatever else stands there."""
    return rng.choices(expressions(thing), weights=(5, 2.5, 1.5, 1))[0]
