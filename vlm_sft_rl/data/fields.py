"""What the fields of rows may hold, whatever the kind of row: pictures, numbers, ids; and fields that nobody reads."""

import re
from collections import Counter
from collections.abc import Collection, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import FORMAT, RowError, short

# as tuples: `isinstance` with `int | float` makes that union anew for every value of a file
_NUMBERS, _LISTS = (int, float), (list, tuple)
_PLAIN = frozenset((str, int, bool, type(None)))
LARGEST_NUMBER = 1e15  # whole numbers beyond it are not exact as floats
PICTURES = ("image", "images")  # the fields that hold pictures
UNKNOWN = "field `{}` is not known here and not used"  # a note
TOOLS = ("tools", "functions", "tool_calls", "function_call", "tool_call_id")
# what says elsewhere which answers are learnt; here that is the `weight` of a message
LOSS = (
    "loss",
    "weight",
    "loss_mask",
    "loss_weight",
    "loss_scale",
    "train",
    "trainable",
    "do_train",
    "mask_loss",
)
_CHOICES = re.compile(
    r"(?:answer|mc|multiplechoice)?(?:option|choice|candidate)(?:s|text|list)*|multiplechoices?"
)

# a name that says "here is a picture" (img, imagePath, input_images, video_2), not one that says something of it (image_id)
_BEFORE = (
    "input|raw|src|main|query|question|context|user|base64|b64|encoded|decoded|rgb|local|original|orig|the|first|"
    "second|left|right"
)
_AFTER = (
    "paths?|files?|names?|urls?|uris?|links?|bytes?|blobs?|base64|b64|data|lists?|columns?|contents?|inputs?|"
    "tensors?|arrays?|values?|pil|rgb|png|jpe?g|str|[0-9]"
)
_MEDIA_NAME = re.compile(
    rf"(?:(?:{_BEFORE})*(?:image|img|picture|pic|photo|screenshot|video|vid|audio|frame|pixel|media)(?:s|es)?"
    rf"(?:{_AFTER})*|base64|b64|bytes|blob)"
)
_SPEAKS_OF_MEDIA = re.compile("image|img|picture|photo|screenshot|video|audio", re.IGNORECASE)
_MEDIA_VALUE = re.compile(
    r"(?:data:(?:image|video|audio)/.*|.{1,500}\.(?:png|jpe?g|webp|gif|bmp|tiff?|heic|avif|mp4|mov|avi|mkv|webm|wav|mp3|flac|ogg)(?:[?#].*)?)",
    re.IGNORECASE,
)


def wrong_field(field: str, expected: str, value: Any, where: str) -> RowError:
    """The error of a field that holds something else than was expected."""
    return RowError(FORMAT, f"field `{field}`: expected {expected}, found {short(value)}.", where)


def strip_none(value: Any) -> Any:
    """Remove keys whose value is None, at every depth: Arrow adds them for fields that other rows have."""
    if isinstance(value, dict):
        return {key: strip_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [strip_none(item) for item in value]
    return value


def is_number(value: Any) -> bool:
    """Whether it is a finite number of a size that computes; True and False are none."""
    kind = type(value)
    if kind is not float and kind is not int and (kind is bool or not isinstance(value, _NUMBERS)):
        return False
    return -LARGEST_NUMBER < value < LARGEST_NUMBER


def check_numbers(row: dict, where: str, checked: Any = None) -> None:
    """Raises RowError: a number anywhere in the row is NaN or infinite; `checked` is a value known to hold none."""
    for value in row.values():
        if type(value) not in _PLAIN and value is not checked and not _is_sound(value):
            break
    else:
        return
    for path, value in _leaves(row, ""):
        if isinstance(value, float) and not is_number(value):
            raise wrong_field(path, "a finite number", value, where)


def _is_sound(value: Any) -> bool:
    if isinstance(value, str):
        return True
    if isinstance(value, float):
        return is_number(value)
    if isinstance(value, dict):
        return all(map(_is_sound, value.values()))
    return not isinstance(value, _LISTS) or all(map(_is_sound, value))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(item, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{path}[{i}]")
    else:
        yield path, value


def either(raw: dict, name: str, other: str, where: str) -> Any:
    """The value of whichever of two names of one field is there. Raises RowError: both are, and they differ."""
    value, second = raw.get(name), raw.get(other)
    if value is None:
        return second
    if second is not None and second != value:
        raise RowError(FORMAT, f"fields `{name}` and `{other}` mean the same and differ. Remove one.", where)
    return value


def identity_of(raw: dict, where: str) -> str:
    """The row's `id` (or `question_id`) as text; without one, the file's name and the row's number.

    Raises RowError: it is neither text nor a number.
    """
    value = raw.get("id")
    if value is None:
        value = raw.get("question_id")
    if isinstance(value, str) and value.strip():
        return value
    if is_number(value):
        return str(value)
    if value is not None:
        raise wrong_field("id", "text that is not empty, or a number", value, where)
    path, _, number = where.rpartition(":")
    return f"{Path(path or where).stem}-{number}"


# --- Pictures ---


def row_images(raw: dict, where: str) -> list:
    """The pictures of a row, from `image` or `images`: paths, PIL images or `datasets.Image` values.

    Either field takes one picture or a list. Nothing, or an empty list, is a row of text.

    Raises RowError: a value that is no picture, or two fields that disagree.
    """
    listed, single = raw.get("images"), raw.get("image")
    if single is None:
        return [] if listed is None else _pictures(listed, "images", where)
    images = _pictures(single, "image", where)
    others = [] if listed is None else _pictures(listed, "images", where)
    if others and images and others != images:
        raise RowError(
            FORMAT,
            f"fields `image` and `images` disagree ({short(images)} and {short(others)}). Keep one of them.",
            where,
        )
    return others or images


def _pictures(value: Any, field: str, where: str) -> list:
    if isinstance(value, str) and value.strip():
        return [value]
    items = value if isinstance(value, list | tuple) else [value]
    return [picture_of(item, field, where) for item in items]


def picture_of(item: Any, field: str, where: str) -> Any:
    """A picture as rows hold it: a path, a PIL image, or `{"bytes", "path"?}`. Raises RowError: it is none of these."""
    if isinstance(item, str) and item.strip():
        return item
    if isinstance(item, Path):
        return str(item)
    if isinstance(item, dict):
        item = {name: part for name, part in item.items() if part is not None}
        data, path = item.get("bytes"), item.get("path")
        if (data or path) is not None and not item.keys() <= {"bytes", "path"}:
            check_unknown(item, ("bytes", "path"), where, None, at=f"{field}.")
        if isinstance(data, bytes | bytearray):
            return item
        if data is not None:
            kind = "text" if isinstance(data, str) else "a list" if isinstance(data, list) else repr(data)
            raise RowError(
                FORMAT,
                f"field `{field}`: `bytes` holds {kind[:80]}. Write the picture to a file and give its path.",
                where,
            )
        if isinstance(path, str) and path.strip():
            return path
    elif hasattr(item, "convert"):  # PIL, without importing it
        return item
    raise RowError(
        FORMAT,
        f"field `{field}`: expected a path, a list of paths, or nothing; found {short(item)}. Leave the field out of "
        "text-only rows.",
        where,
    )


# --- Fields that nobody reads ---


def check_unknown(
    raw: dict,
    known: Collection[str],
    where: str,
    notes: Counter | None,
    images: list | None = None,
    at: str = "",
) -> None:
    """Look at the fields that a reader does not know: what would be lost with them is refused, the others are noted.

    Args:
        images: the pictures that the row has where it should have them; None: this is no row but a part of one.
        at: where in the row `raw` stands, for messages.

    Raises RowError: a field holds pictures, videos or sound, or tools.
    """
    for name, value in raw.items():
        if name in known or value is None:
            continue
        name = str(name)[:60]
        if name in TOOLS and value:
            raise RowError(FORMAT, f"field `{at}{name}`: tool calls are not supported. Remove it.", where)
        if name in LOSS and "choices" not in known and "box" not in known:
            cure = "Say what is learnt with `weight` 0 or 1 in each message"
            raise RowError(FORMAT, f"field `{at}{name}` is not read here. {cure}, or remove it.", where)
        if (
            "choices" in known
            and value
            and raw.get("choices") in (None, [], "")
            and _lists_choices(name, raw)
        ):
            raise RowError(
                FORMAT,
                f"field `{name}` looks like the choices ({short(value, 60)}) and would not be asked. Write them as the list "
                f"`choices` (`vlm-sft-rl data convert --format jsonl --map choices={name}`), or remove the field.",
                where,
            )
        if _would_be_lost(name, value, images):
            cure = (
                f"`images` (`vlm-sft-rl data convert --format jsonl --map images={name}`)"
                if images is not None
                else "the row's `images`"
            )
            raise RowError(
                FORMAT,
                f"field `{at}{name}` looks like a picture, video or sound ({short(value, 60)}) and would be lost: pictures "
                f"are read from `image` and `images` alone. Rename it to {cure}, or remove it.",
                where,
            )
        if notes is not None:
            notes[UNKNOWN.format(re.sub(r"\[\d+\]", "[]", at) + name)] += 1


def _lists_choices(name: str, raw: dict) -> bool:
    """Whether a field holds choices: all of them, or the first of one column a letter."""
    return (name == "A" and "B" in raw) or bool(_CHOICES.fullmatch(re.sub(r"[^a-z]", "", name.lower())))


def _would_be_lost(name: str, value: Any, images: list | None) -> bool:
    items = value if isinstance(value, list | tuple) else [value]
    values = [item for item in items if _holds_something(item)]
    if not values:
        return False
    if not _is_media_name(name) and not (_SPEAKS_OF_MEDIA.search(name) and any(map(_is_media, values))):
        return not images and any(map(_is_media, values))
    # data sets keep the old name of a picture beside it
    kept = [image if isinstance(image, str) else "" for image in images or []]
    return (
        len(values) != len(kept)
        or re.search("vid|audio", name, re.IGNORECASE) is not None
        or not all(
            isinstance(item, str) and (not path or Path(path).name == Path(item).name)
            for item, path in zip(values, kept, strict=True)
        )
    )


def _holds_something(value: Any) -> bool:
    """A number holds no picture, nor does an empty text or list."""
    if isinstance(value, str | bytes | bytearray | dict | list | tuple):
        return bool(value)
    return not isinstance(value, bool | int | float | type(None))


def _is_media(value: Any) -> bool:
    if isinstance(value, dict):
        is_picture = value.keys() <= {"bytes", "path", "url"} and any(map(_holds_something, value.values()))
        return is_picture or any(
            _is_media(item) or (_is_media_name(str(name)) and _holds_something(item))
            for name, item in value.items()
        )
    if isinstance(value, list | tuple):
        return any(map(_is_media, value))
    if isinstance(value, str):
        return len(value) < 600 and _MEDIA_VALUE.fullmatch(value.strip()) is not None
    return isinstance(value, bytes | bytearray) or hasattr(value, "convert")


@lru_cache(maxsize=1024)
def _is_media_name(name: str) -> bool:
    return _MEDIA_NAME.fullmatch(re.sub(r"[^a-z0-9]", "", name.lower())[:100]) is not None
