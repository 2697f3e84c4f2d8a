"""What every source format is given, and the field checks that they share."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import FORMAT, RowError


@dataclass
class Source:
    """A file to convert.

    Args:
        path: the file, or the folder for `hf`.
        image_prefix: put before every image path.
        annotations: second file that some formats need.
        fields: `{our field: column}`, for the formats that take any columns.
        box_format: "xyxy" or "xywh", where a format does not fix it.
        split: which split to read, for folders and files that hold several.
        images_dir: where images that come inside the file are written to.
        images_base: folder that their paths in the rows are relative to.
        notes: counts what is left out or changed.
    """

    path: Path
    image_prefix: str = ""
    annotations: Path | None = None
    fields: dict[str, str] = field(default_factory=dict)
    box_format: str = "xyxy"
    split: str | None = None
    images_dir: Path | None = None
    images_base: Path | None = None
    notes: Counter = field(default_factory=Counter)

    def at(self, number: int | str) -> str:
        """Where row `number` is, for errors."""
        return f"{self.path}:{number}"

    def image(self, *parts: str) -> str:
        """The path of an image as it stands in a row."""
        path = "/".join(part.strip("/") for part in parts if part.strip("/"))
        return f"{self.image_prefix.rstrip('/')}/{path}" if self.image_prefix else path


def take(raw: dict, name: str, kinds: type | tuple[type, ...], where: str) -> Any:
    """`raw[name]`, of one of the types. Raises RowError that names file, row and field."""
    if not isinstance(raw, dict):
        raise RowError(FORMAT, f"expected an object, found {raw!r:.80}.", where)
    if raw.get(name) is None:
        raise RowError(
            FORMAT, f"no field `{name}`. The row has {sorted(raw)}. Is this the right format?", where
        )
    value = raw[name]
    if not isinstance(value, kinds) or isinstance(value, bool):
        names = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise RowError(FORMAT, f"field `{name}`: expected {names}, found {value!r:.80}.", where)
    return value


def take_text(raw: dict, name: str, where: str) -> str:
    """As `take`, for text that is not blank; numbers become text."""
    text = str(take(raw, name, (str, int, float), where)).strip()
    if not text:
        raise RowError(FORMAT, f"field `{name}` is empty.", where)
    return text
