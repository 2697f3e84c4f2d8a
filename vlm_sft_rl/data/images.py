"""The images of rows: inside the image root, complete, of a sane size, upright, RGB."""

import hashlib
import io
import logging
import random
import re
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, features

from ..errors import (
    FORMAT,
    IMAGE_BOMB,
    MISSING_IMAGE,
    OUTSIDE_ROOT,
    UNREADABLE_IMAGE,
    RowError,
    UserError,
    first_line,
    short,
)
from ..io import replacing, require_file
from .fields import picture_of

LARGEST_IMAGE = 89_478_485  # pixels; Pillow's own limit for a quarter gigabyte of RGB
# what is opened; others of Pillow's formats run a program (EPS), name other files, or hold no photographs
FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
    *(["AVIF"] if "avif" in features.modules else []),
)
# how base64 text of a picture begins: a data URL, or the first bytes of JPEG, PNG, GIF or WebP
_BASE64 = re.compile(r"data:|/9j/|iVBORw0KGgo|R0lGOD|UklGR")

_WIDTH, _LENGTH, _BITS_PER_SAMPLE, _PHOTOMETRIC = 256, 257, 258, 262  # tags of TIFF

# what Pillow warns of is an error here, with the image's place; a filter for each image would be one for all threads
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
logger = logging.getLogger(__name__)


def image_root_of(rows_path: str | Path, image_root: str | Path | None = None) -> Path:
    """The folder that the image paths of a file of rows start from: the one given, else the folder of the file.

    Raises UserError: it is not a folder; or there is no such file and no folder given.
    """
    if image_root is None:
        require_file(rows_path)
    root = Path(rows_path).resolve().parent if image_root is None else Path(image_root)
    if not root.is_dir():
        raise UserError(
            f"image_root {str(root)!r} is not a folder. Give the folder that image paths start from."
        )
    return root


def open_image(item: Any, image_root: str | Path | None = None) -> Image.Image:
    """Open one entry of a row's `images`.

    Args:
        item: a path, encoded bytes, a PIL image, or a `datasets.Image` value (`{"bytes": ..., "path": ...}`).
        image_root: folder that paths are relative to and must not leave, not even through a symbolic link.
            Without it a path is taken as it is.

    Returns:
        An RGB image, rotated as its EXIF says, transparency laid on white. Of an animation the first frame, which is
        logged.

    Raises RowError: missing, unreadable, outside of the root, more than `LARGEST_IMAGE` pixels, or of 32-bit numbers.
    """
    if isinstance(item, Image.Image):
        return _load(item, "image")
    source, name = _source(item, image_root)
    with open_picture(source, name) as image:
        return _load(image, name)


def open_picture(source: Any, name: str = "image") -> Image.Image:
    """`Image.open` for the formats that pictures come in; the header is read, not the pixels.

    Args:
        source: a file's path or a binary stream.
        name: stands in errors.

    Raises RowError: unreadable, or more than `LARGEST_IMAGE` pixels.
    """
    try:
        image = Image.open(source, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _bomb(name, str(error)) from error
    except UnidentifiedImageError as error:
        raise RowError(
            UNREADABLE_IMAGE,
            f"image {short(name, 200)} cannot be read: damaged, or none of {', '.join(FORMATS)}. Replace the file or drop "
            "the row.",
        ) from error
    except Exception as error:  # decoders raise many types on damaged files
        raise _unreadable(name, error) from error
    if image.width * image.height > LARGEST_IMAGE:
        image.close()
        raise _bomb(name, f"{image.width}x{image.height}")
    return image


def random_crop(picture: Image.Image, most: float, rng: random.Random) -> Image.Image:
    """A part of the picture, enlarged to its size: a share of its area drawn between 1 % and `most`, anywhere in it, its
    proportions kept."""
    side = rng.uniform(0.01, most) ** 0.5
    width, height = (max(1, round(length * side)) for length in picture.size)
    left, top = rng.randint(0, picture.width - width), rng.randint(0, picture.height - height)
    return picture.resize(picture.size, Image.Resampling.BICUBIC, (left, top, left + width, top + height))


def image_size(item: Any, image_root: str | Path | None = None) -> tuple[int, int]:
    """Width and height of an entry of a row's `images` as `open_image` would give it, from the header alone.

    Raises RowError: missing, unreadable, or outside of the root.
    """
    (width, height), orientation = _header(item, image_root)
    return (height, width) if orientation >= 5 else (width, height)


def boxed_size(
    item: Any, image_root: str | Path | None = None, stated: tuple[float, float] | None = None
) -> tuple[int, int]:
    """Width and height of an image that a box lies on, from the header alone.

    Args:
        stated: the size that the box's row gives.

    Raises RowError: as `image_size`; or the image's EXIF turns or mirrors it, and `stated` does not tell whether the box
    means the pixels before or after.
    """
    (width, height), orientation = _header(item, image_root)
    upright = (height, width) if orientation >= 5 else (width, height)
    if orientation != 1 and (stated != upright or width == height or orientation < 5):
        raise RowError(
            FORMAT,
            f"image {short(_name(item), 200)} has the EXIF orientation {orientation}: it is shown turned or mirrored, and a "
            "box may mean its pixels before or after that. Store it upright (`mogrify -auto-orient`), with boxes to match.",
        )
    return upright


def _header(item: Any, image_root: str | Path | None) -> tuple[tuple[int, int], int]:
    """The size of the pixels as they are stored, and the EXIF orientation (1: upright)."""
    if isinstance(item, Image.Image):
        return _stored_size(item), _orientation(item)
    source, name = _source(item, image_root)
    with open_picture(source, name) as image:
        try:
            return _stored_size(image), _orientation(image)
        except Exception as error:  # damaged EXIF, or a PNG that has it behind its pixels
            raise _unreadable(name, error) from error


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """The size of the pixels before they are turned; Pillow gives that of a TIFF as it is shown."""
    if image.format == "TIFF" and _orientation(image) >= 5:
        return image.tag_v2[_WIDTH], image.tag_v2[_LENGTH]
    return image.size


def _orientation(image: Image.Image) -> int:
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in range(1, 9) else 1


def image_key(item: Any) -> Any:
    """What tells one entry of a row's `images` from another: its path, or a digest of its content."""
    if isinstance(item, Image.Image):
        return hashlib.sha256(f"{item.mode}{item.size}".encode() + item.tobytes()).digest()
    content = image_content(item)
    return content if isinstance(content, str) else hashlib.sha256(content).digest()


def store_image(data: bytes, folder: Path) -> Path:
    """Write an encoded image into a folder under a name made of its content: equal images are one file.

    Raises RowError: the bytes are no image. UserError: the file cannot be written.
    """
    with open_picture(io.BytesIO(data), "image bytes") as image:
        suffix = {"JPEG": "jpg", "MPO": "jpg"}.get(image.format, image.format.lower())
    path = folder / f"{hashlib.sha256(data).hexdigest()[:20]}.{suffix}"
    if not path.exists():
        with replacing(path, "wb") as handle:
            handle.write(data)
    return path


def locate(item: str | Path, image_root: str | Path | None) -> Path:
    """The file that an image path means, without opening it. Raises RowError as `open_image` does."""
    if "://" in str(item):
        raise RowError(
            FORMAT,
            f"image {short(str(item), 200)} is an address: nothing is fetched. Download it into image_root.",
        )
    try:
        path = Path(item) if image_root is None else Path(image_root, item)
        resolved = path.resolve()
        if image_root is not None and not resolved.is_relative_to(Path(image_root).resolve()):
            raise RowError(
                OUTSIDE_ROOT,
                f"image {short(str(item), 200)} lies outside of image_root {str(image_root)!r}. Move or copy it "
                "inside, or choose another image_root.",
            )
        # is_file also keeps us from opening a pipe, which would block for ever
        exists, is_file = resolved.exists(), resolved.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise RowError(
            MISSING_IMAGE, f"image {short(str(item), 200)} is not a usable path ({reason})."
        ) from error
    if not exists:
        cure = ". Check the path." if image_root is None else f" under {str(image_root)!r}. Check image_root."
        raise RowError(MISSING_IMAGE, f"image {short(str(item), 200)} does not exist{cure}")
    if not is_file:
        raise RowError(UNREADABLE_IMAGE, f"image {short(str(item), 200)} is not a regular file.")
    return resolved


def image_content(item: Any) -> bytes | str:
    """What an image of a row is, unless it is a PIL image: its encoded bytes, or its path; nothing is opened.

    Raises RowError: it is neither, such as base64 text or a list of numbers in place of bytes.
    """
    if not isinstance(item, bytes | bytearray):
        item = picture_of(item, "images", "")
    content = item["bytes"] if isinstance(item, dict) else item
    if isinstance(content, str) and _BASE64.match(content):
        raise RowError(
            FORMAT,
            f"an image is given as base64 text ({short(content, 40)}), expected a path. Decode it, write it to a file and "
            "give the file's path.",
        )
    return content if isinstance(content, str) else bytes(content)


def _name(item: Any) -> str:
    path = item.get("path") if isinstance(item, dict) else item
    return str(path) if isinstance(path, str | Path) else "image bytes"


def _source(item: Any, image_root: str | Path | None) -> tuple[Any, str]:
    """What Pillow opens for an image of a row, and its name for messages."""
    content = image_content(item)
    if isinstance(content, bytes):
        return io.BytesIO(content), _name(item)
    return locate(content, image_root), content


def _load(image: Image.Image, name: str) -> Image.Image:
    if image.width * image.height > LARGEST_IMAGE:
        raise _bomb(name, f"{image.width}x{image.height}")
    if image.mode in ("F", "LAB") or (image.mode == "I" and image.format != "PPM"):
        raise RowError(
            UNREADABLE_IMAGE,
            f"image {short(name, 200)} has pixels of mode {image.mode}, and nothing says which number is white. Save it as "
            "8-bit RGB or grey.",
        )
    try:
        if getattr(image, "is_animated", False) and image.format != "MPO":  # a photograph with its preview
            _note_animation(name)
        image.load()
        tags = getattr(image, "tag_v2", {})
        if _orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = _eight_bit(image, tags)
        if image.has_transparency_data:
            layer = image.convert("RGBA")
            image = Image.new("RGB", image.size, "white")
            image.paste(layer, mask=layer.getchannel("A"))
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:
        raise RowError(
            UNREADABLE_IMAGE,
            f"image {short(name, 200)} is damaged or incomplete ({first_line(error)}). Replace the file or drop the row.",
        ) from error


def _eight_bit(image: Image.Image, tags: Mapping) -> Image.Image:
    """Grey of up to 16 bits as 8 bits, which a plain conversion would clip to white; what is transparent is white.

    Args:
        tags: those of TIFF, else none.
    """
    bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
    grey = np.asarray(image)
    shade = (grey >> (bits - 8)).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero, which Pillow sees to for 8 bits alone
        shade = 255 - shade
    if (clear := image.info.get("transparency")) is not None:
        shade[grey == clear] = 255
    return Image.fromarray(shade)


@lru_cache(maxsize=1000)
def _note_animation(name: str) -> None:
    logger.warning("image %.200r is an animation or has several pages: the first is used.", name)


def _unreadable(name: str, error: Exception) -> RowError:
    reason = (
        f"image {short(name, 200)} cannot be read ({first_line(error)}). Replace the file or drop the row."
    )
    return RowError(UNREADABLE_IMAGE, reason)


def _bomb(name: str, size: str) -> RowError:
    return RowError(
        IMAGE_BOMB,
        f"image {short(name, 200)} is too large to open safely ({size}; the limit is {LARGEST_IMAGE} pixels). Scale "
        "it down.",
    )
