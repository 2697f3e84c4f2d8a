"""Draw a scene: soft scenery, and symbols of the DejaVu font with a light rim, at twice the size and scaled down."""

import random
from functools import lru_cache

from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from .world import CELL_PIXELS, CELLS, COLOURS, GRID, IMAGE_PIXELS, NOUNS, SIZES, Scene, SceneObject

SCALE = 2
# (sky top, sky bottom, ground top, ground bottom, horizon as a share of the height)
SCENERY = {
    "beach": ((206, 232, 248), (232, 244, 250), (246, 232, 196), (238, 218, 170), 0.55),
    "desert": ((252, 236, 208), (254, 244, 226), (244, 214, 164), (236, 200, 146), 0.62),
    "meadow": ((212, 234, 250), (238, 246, 252), (206, 232, 184), (186, 220, 160), 0.58),
    "room": ((242, 236, 228), (248, 243, 236), (224, 206, 184), (212, 190, 164), 0.70),
    "snow": ((220, 230, 242), (236, 242, 248), (246, 250, 253), (232, 240, 247), 0.52),
}


def _font_path() -> str:
    return font_manager.findfont("DejaVu Sans", fallback_to_default=False)


@lru_cache(maxsize=1024)
def _symbol(noun: str, pixels: int) -> tuple[Image.Image, Image.Image]:
    """Masks (rim, ink) of `noun`, its longer side `pixels` wide at the drawing scale."""
    target = pixels * SCALE
    glyph = chr(NOUNS[noun])
    probe = ImageFont.truetype(_font_path(), 100)
    left, top, right, bottom = probe.getbbox(glyph)
    font = ImageFont.truetype(
        _font_path(), max(8, round(100 * (target - 4) / max(right - left, bottom - top)))
    )
    rim, ink = Image.new("L", (target, target)), Image.new("L", (target, target))
    left, top, right, bottom = font.getbbox(glyph)
    origin = ((target - (right - left)) / 2 - left, (target - (bottom - top)) / 2 - top)
    ImageDraw.Draw(rim).text(origin, glyph, font=font, fill=255, stroke_width=2)
    ImageDraw.Draw(ink).text(origin, glyph, font=font, fill=255, stroke_width=1 if noun in _THIN else 0)
    return rim, ink


# outline drawings whose strokes would vanish at 20 pixels
_THIN = {"atom", "cup", "envelope", "moon", "snowman", "pencil", "keyboard", "scissors", "bolt"}


@lru_cache(maxsize=len(SCENERY))
def _backdrop(theme: str) -> Image.Image:
    sky_top, sky_bottom, ground_top, ground_bottom, horizon = SCENERY[theme]
    side = IMAGE_PIXELS * SCALE
    picture = Image.new("RGB", (side, side))
    pen = ImageDraw.Draw(picture)
    edge = round(side * horizon)
    for y in range(side):
        upper = y < edge
        share = y / edge if upper else (y - edge) / (side - edge)
        start, stop = (sky_top, sky_bottom) if upper else (ground_top, ground_bottom)
        pen.line(
            [(0, y), (side, y)],
            fill=tuple(round(a + (b - a) * share) for a, b in zip(start, stop, strict=True)),
        )
    return picture


def _scenery(scene: Scene, rng: random.Random) -> Image.Image:
    """The theme's backdrop with a few low-contrast shapes, so that no two backgrounds are alike."""
    picture = _backdrop(scene.theme).copy()
    pen = ImageDraw.Draw(picture, "RGBA")
    side = picture.width
    edge = round(side * SCENERY[scene.theme][4])
    for _ in range(3):
        x, width = rng.randint(0, side), rng.randint(30, 90)
        if scene.theme == "room":
            pen.line([(x, edge), (x - width, side)], fill=(120, 90, 60, 40), width=3)
        else:
            height = rng.randint(8, 26)
            pen.ellipse(
                [x - width, edge - height, x + width, edge + height], fill=SCENERY[scene.theme][2] + (110,)
            )
    return picture


def render(scene: Scene, seed: int) -> Image.Image:
    """Draw `scene` as an RGB picture of `IMAGE_PIXELS` a side; `seed` moves the scenery only."""
    picture = _scenery(scene, random.Random(seed))
    for item in scene.objects:
        paste_symbol(picture, item)
    return picture.resize((IMAGE_PIXELS, IMAGE_PIXELS), Image.Resampling.LANCZOS)


def paste_symbol(picture: Image.Image, item: SceneObject) -> None:
    """Draw one object, with its rim, on a picture at the drawing scale."""
    left, top, right, _ = item.box
    rim, ink = _symbol(item.noun, right - left)
    corner = (left * SCALE, top * SCALE)
    picture.paste((255, 255, 255), corner, rim)
    picture.paste(COLOURS[item.colour], corner, ink)


# Dot charts: a symbol in each column, as high above the axis as its value.
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
