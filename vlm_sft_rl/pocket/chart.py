"""Pictograms: small bar charts whose bars are stacked symbols, on paper with an axis."""

import random

from PIL import Image, ImageDraw

from .render import SCALE, paste_symbol
from .world import CELL_PIXELS, CELLS, COLOURS, GRID, IMAGE_PIXELS, NOUNS, SIZES, Scene, SceneObject

PAPER, AXIS = (250, 249, 245), (120, 120, 124)
THEME = "chart"


def draw_chart(rng: random.Random, bars: tuple[int, int] = (2, 4)) -> Scene:
    """Draw a chart: each column of the grid may be a bar of 1 to 4 equal symbols of a
    colour of its own, standing on the axis."""
    columns = sorted(rng.sample(range(GRID), rng.randint(*bars)))
    nouns = rng.sample(tuple(NOUNS), len(columns))
    colours = rng.sample(tuple(COLOURS), len(columns))
    objects = []
    for column, noun, colour in zip(columns, nouns, colours, strict=True):
        for level in range(rng.randint(1, GRID)):
            pixels = SIZES["large"][0]
            row = GRID - 1 - level
            left = column * CELL_PIXELS + (CELL_PIXELS - pixels) // 2
            top = row * CELL_PIXELS + (CELL_PIXELS - pixels) // 2
            cell = CELLS[row * GRID + column]
            objects.append(SceneObject(noun, colour, "large", cell, (left, top, left + pixels, top + pixels)))
    return Scene(THEME, tuple(sorted(objects, key=lambda item: CELLS.index(item.cell))))


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
