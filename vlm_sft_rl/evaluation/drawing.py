"""Boxes drawn on a picture."""

from PIL import Image, ImageDraw

ORIGINAL, LOCATED = (20, 150, 70), (215, 60, 30)
SHORTEST = 256  # small pictures are enlarged to this before boxes are drawn


def draw_boxes(image: Image.Image, box, located) -> Image.Image:
    """The picture with the region (green) and the located box (red, inside of it where they agree).

    Args:
        box, located: (x0, y0, x1, y1) in pixels of the picture, or None.
    """
    scale = max(1, -(-SHORTEST // min(image.size)))
    picture = image.resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS)
    pen, width = ImageDraw.Draw(picture), max(2, min(picture.size) // 100)
    for corners, colour, inset in ((box, ORIGINAL, 0), (located, LOCATED, 2 * width)):
        if corners is not None:
            x0, y0, x1, y1 = (value * scale for value in corners)
            inner = (x0 + inset, y0 + inset, max(x0 + inset, x1 - inset - 1), max(y0 + inset, y1 - inset - 1))
            pen.rectangle(inner, outline=colour, width=width)
    return picture
