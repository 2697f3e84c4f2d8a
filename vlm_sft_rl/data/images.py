"""The images of rows: inside the image root, complete, of a sane size, upright, RGB."""

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ..errors import FORMAT, IMAGE_BOMB, MISSING_IMAGE, OUTSIDE_ROOT, UNREADABLE_IMAGE, RowError, UserError
from ..io import replacing

LARGEST_IMAGE = 89_478_485  # pixels; Pillow's own limit for a quarter gigabyte of RGB


def image_root_of(rows_path: str | Path, image_root: str | Path | None = None) -> Path:
    """The folder that the image paths of a file of rows start from: the one given, else the folder of the file.

    Raises UserError: it is not a folder; or there is no such file and no folder given.
    """
    if image_root is None and not Path(rows_path).is_file():
        raise UserError(f"{rows_path}: no such file. Check the path.")
    root = Path(rows_path).resolve().parent if image_root is None else Path(image_root)
    if not root.is_dir():
        raise UserError(
            f"image_root {str(root)!r} is not a folder. Give the folder that image paths start from."
        )
    return root


def open_image(item: Any, image_root: str | Path | None = None) -> Image.Image:
    """Open one entry of a row's `images`.

    Args:
        item: a path, a PIL image, or a `datasets.Image` value (`{"bytes": ..., "path": ...}`).
        image_root: folder that paths are relative to and must not leave, not even through a symbolic link.
            Without it a path is taken as it is.

    Returns:
        An RGB image, rotated as its EXIF says, transparency laid on white.

    Raises RowError: missing, unreadable, outside of the root, or more than `LARGEST_IMAGE` pixels.
    """
    if isinstance(item, Image.Image):
        return _load(item, "image")
    source, name = _source(item, image_root)
    try:
        image = Image.open(source)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _bomb(name, str(error)) from error
    except Exception as error:  # decoders raise many types on damaged files
        raise RowError(
            UNREADABLE_IMAGE, f"image {name!r} cannot be read ({error}). Replace the file or drop the row."
        ) from error
    with image:
        return _load(image, name)


def image_size(item: Any, image_root: str | Path | None = None) -> tuple[int, int]:
    """Width and height of an entry of a row's `images` as `open_image` would give it, from the header alone.

    Raises RowError: missing, unreadable, or outside of the root.
    """
    if isinstance(item, Image.Image):
        return _upright_size(item)
    source, name = _source(item, image_root)
    try:
        with Image.open(source) as image:
            return _upright_size(image)
    except Exception as error:  # decoders raise many types on damaged files
        raise RowError(UNREADABLE_IMAGE, f"image {name!r} cannot be read ({error}).") from error


def image_key(item: Any) -> Any:
    """What tells one entry of a row's `images` from another: its path, or a digest of its content."""
    if isinstance(item, dict):
        data = item.get("bytes")
        return hashlib.sha256(data).digest() if data is not None else str(item.get("path"))
    if isinstance(item, Image.Image):
        return hashlib.sha256(f"{item.mode}{item.size}".encode() + item.tobytes()).digest()
    return str(item)


def store_image(data: bytes, folder: Path) -> Path:
    """Write an encoded image into a folder under a name made of its content: equal images are one file.

    Raises OSError: the bytes are no image. Pillow's decoders may raise other errors for damaged ones. UserError: the
    file cannot be written.
    """
    with Image.open(io.BytesIO(data)) as image:
        suffix = {"JPEG": "jpg"}.get(image.format, (image.format or "img").lower())
    path = folder / f"{hashlib.sha256(data).hexdigest()[:20]}.{suffix}"
    if not path.exists():
        with replacing(path, "wb") as handle:
            handle.write(data)
    return path


def locate(item: str | Path, image_root: str | Path | None) -> Path:
    """The file that an image path means, without opening it. Raises RowError as `open_image` does."""
    if "://" in str(item):
        raise RowError(
            FORMAT, f"image {str(item)!r} is an address: nothing is fetched. Download it into image_root."
        )
    try:
        path = Path(item) if image_root is None else Path(image_root, item)
        resolved = path.resolve()
        if image_root is not None and not resolved.is_relative_to(Path(image_root).resolve()):
            raise RowError(
                OUTSIDE_ROOT,
                f"image {str(item)!r} lies outside of image_root {str(image_root)!r}. Move or copy it "
                "inside, or choose another image_root.",
            )
        # is_file also keeps us from opening a pipe, which would block for ever
        exists, is_file = resolved.exists(), resolved.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        raise RowError(MISSING_IMAGE, f"image {str(item)!r:.200} is not a usable path ({error}).") from error
    if not exists:
        cure = ". Check the path." if image_root is None else f" under {str(image_root)!r}. Check image_root."
        raise RowError(MISSING_IMAGE, f"image {str(item)!r} does not exist{cure}")
    if not is_file:
        raise RowError(UNREADABLE_IMAGE, f"image {str(item)!r} is not a regular file.")
    return resolved


def _source(item: Any, image_root: str | Path | None) -> tuple[Any, str]:
    """What Pillow opens for a path or a `datasets.Image` value, and its name for messages."""
    if isinstance(item, dict):
        if item.get("bytes") is not None:
            return io.BytesIO(item["bytes"]), item.get("path") or "image bytes"
        item = item.get("path")
    if not isinstance(item, str | Path):
        raise RowError(FORMAT, f"field `images`: expected a path or an image, found {type(item).__name__}.")
    return locate(item, image_root), str(item)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return (image.height, image.width) if turned else image.size


def _load(image: Image.Image, name: str) -> Image.Image:
    if image.width * image.height > LARGEST_IMAGE:
        raise _bomb(name, f"{image.width}x{image.height}")
    try:
        image.load()
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            # a plain conversion would clip 16-bit grey to white
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            layer = image.convert("RGBA")
            image = Image.new("RGB", image.size, "white")
            image.paste(layer, mask=layer.getchannel("A"))
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:
        raise RowError(
            UNREADABLE_IMAGE,
            f"image {name!r} is damaged or incomplete ({error}). Replace the file or drop the row.",
        ) from error


def _bomb(name: str, size: str) -> RowError:
    return RowError(
        IMAGE_BOMB,
        f"image {name!r} is too large to open safely ({size}; the limit is {LARGEST_IMAGE} pixels). Scale "
        "it down.",
    )
