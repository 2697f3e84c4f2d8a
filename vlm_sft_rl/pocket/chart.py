"""Dot charts: a symbol in each column, as high above the axis as its value."""

import random

from PIL import Image, ImageDraw

from .render import SCALE, paste_symbol
from .world import CELL_PIXELS, CELLS, COLOURS, GRID, IMAGE_PIXELS, NOUNS, SIZES, Scene, SceneObject

PAPER, AXIS = (250, 249, 245), (120, 120, 124)
THEME = "chart"


def draw_chart(rng: random.Random, columns: tuple[int, int] = (3, 4)) -> Scene:
    """Draw a chart: each of some columns of the grid has one symbol at a height of 1 to 4."""
    chosen = sorted(rng.sample(range(GRID), rng.randint(*columns)))
    pixels = SIZES["large"][0]
    objects = []
    for column, noun in zip(chosen, rng.sample(tuple(NOUNS), len(chosen)), strict=True):
        row = rng.randrange(GRID)
        left = column * CELL_PIXELS + (CELL_PIXELS - pixels) // 2
        top = row * CELL_PIXELS + (CELL_PIXELS - pixels) // 2
        box = (left, top, left + pixels, top + pixels)
        objects.append(
            SceneObject(noun, rng.choice(tuple(COLOURS)), "large", CELLS[row * GRID + column], box)
        )
    return Scene(THEME, tuple(sorted(objects, key=lambda item: CELLS.index(item.cell))))


def value(item: SceneObject) -> int:
    """What a symbol of a chart stands for: its height above the axis, 1 to 4."""
    return GRID - CELLS.index(item.cell) // GRID


def render_chart(scene: Scene) -> Image.Image:
    """Draw a chart as an RGB picture of `IMAGE_PIXELS` a side."""
    side = IMAGE_PIXELS * SCALE
    picture = Image.new("RGB", (side, side), PAPER)
    pen = ImageDraw.Draw(picture)
    pen.line([(2, side - 2), (side, side - 2)], fill=AXIS, width=3)
    pen.line([(2, 0), (2, side - 2)], fill=AXIS, width=3)
    for item in scene.objects:
        paste_symbol(picture, item)
    return picture.resize((IMAGE_PIXELS, IMAGE_PIXELS), Image.Resampling.LANCZOS)
