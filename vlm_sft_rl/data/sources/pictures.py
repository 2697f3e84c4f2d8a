"""The images of records: their paths in rows, files for those that come inside the source, and their sizes for boxes."""

from typing import Any

from ...errors import RowError, UserError
from ..images import boxed_size, image_content, store_image
from .source import Record


def picture_path(r: Record, item: Any) -> str:
    """The path, in rows, of an image of a record; one that comes as encoded bytes is written to a file.

    Raises RowError: it is no path and no picture. UserError: there is no folder to write it to.
    """
    source = r.source
    try:
        content = image_content(item)
        if isinstance(content, str):
            return source.image(content)
        if source.images_dir is None:
            raise UserError(f"{r.where}: images come inside the file. Say where to write them: --images-dir.")
        if source.image_prefix:
            raise UserError(f"{r.where}: images come inside the file, so --image-prefix has no meaning.")
        path = store_image(content, source.images_dir)
    except RowError as error:
        raise error.at(r.where) from error
    return path.relative_to(source.images_base or source.images_dir).as_posix()


def picture_size(
    r: Record, path: str, stated: tuple[int, int] | None, known: dict[tuple, tuple[int, int]]
) -> tuple[int, int]:
    """Width and height of the image of a record with a box; an image that is there must have the size that is stated.

    Args:
        path: of the image, in rows.
        stated: the size that the file gives, if it does.
        known: what earlier calls gave.

    Raises RowError: the image is of another size, may be meant turned or as it is stored, or is needed and not there.
    """
    if (path, stated) in known:
        return known[path, stated]
    base = r.source.images_base
    roots = [r.source.path.parent, *([base] if base else [])]
    try:
        root = next((root for root in roots if (root / path).is_file()), None)
        if root is None and stated:
            size = stated
        else:  # absolute paths are for an image root of /
            size = boxed_size(path, None if path.startswith("/") else root or roots[0], stated)
    except OSError as error:  # such as a path of 5,000 letters
        raise r.wrong(f"image {path!r:.200} is not a usable path ({error.strerror}).") from error
    except RowError as error:
        lack = "" if stated else "no `width` and `height`, and its image cannot tell: "
        raise RowError(error.kind, f"{lack}{error.reason}", r.where) from error
    if stated not in (None, size):
        raise r.wrong(
            f"the size is given as {stated[0]} x {stated[1]}, but image {path!r:.200} has {size[0]} x {size[1]} pixels. "
            "Boxes are in pixels of the upright image: scale them to it."
        )
    known[path, stated] = size
    return size
