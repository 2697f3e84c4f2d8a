"""A file to convert (`Source`), its records with their images, and which regions to keep of it (`RegionFilter`)."""

import heapq
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import FORMAT, RowError, UserError, short
from ...json_stream import stream_json_arrays, stream_json_object
from ...settings import Checked, setting
from ..fields import is_number
from ..rows import LETTERS, letter_said, option_texts, read_raw, wrong_field

if TYPE_CHECKING:
    from .conventions import Boxes

_LETTER = re.compile(r"[(\[]?([A-Za-z])[)\]]?[.:]?")
_LETTERED = re.compile(r"[(\[]?([A-Za-z])[)\].:]+\s+(.+)", re.DOTALL)
_BOOLEANS = (("no", "yes"), ("false", "true"))


@dataclass
class Source:
    """A file to convert.

    Args:
        path: the file, or the folder for `hf`.
        fields: `{our field: column}`, for the formats that take any columns.
        images_base: folder that the paths of images that come inside the file are relative to in the rows.
        notes: counts what is left out or changed.
    """

    path: Path
    image_prefix: str | None = setting(None, "Folder to put before every image path.")
    annotations: str | Path | None = setting(None, "With --format refcoco: path of instances.json.")
    box_format: str | None = setting(
        None,
        "How boxes are written: xyxy or xywh in pixels; norm1, norm100 or norm1000 for [x0, y0, x1, y1] as "
        "shares, percents or thousandths of the image. Default: xyxy; for coco and refcoco xywh; for sc_tune norm1.",
    )
    split: str | None = setting(None, "With --format hf or refcoco: the split.")
    images_dir: str | Path | None = setting(
        None,
        "With --format hf: folder to write images to that are inside the file. Default: images/ beside TARGET.",
    )
    fields: Mapping[str, str] = field(default_factory=dict)
    images_base: Path | None = None
    notes: Counter = field(default_factory=Counter)

    def __post_init__(self):
        # the command line imports this module for its options, and should not wait for numpy
        from .conventions import BOX_FORMATS

        if self.box_format not in (None, *BOX_FORMATS):
            raise UserError(f"Unknown box format {self.box_format!r}: one of {', '.join(BOX_FORMATS)}.")

    def boxes(self, usual: str = "xyxy") -> "Boxes":
        """The boxes of the file, which are in the convention `usual` unless the person says another."""
        from .conventions import Boxes

        return Boxes(self.path, self.box_format, self.notes, usual)

    def image(self, *parts: str) -> str:
        """The path of an image as it stands in a row."""
        path = "/".join(part.strip("/") for part in parts if part.strip("/"))
        if self.image_prefix:
            return f"{self.image_prefix.rstrip('/')}/{path}"
        return f"/{path}" if parts[0].startswith("/") else path


class Record(NamedTuple):
    """An entry of a file, and its number or key there. What it lacks is a RowError that names the place."""

    source: Source
    key: Any
    raw: Any

    @property
    def where(self) -> str:
        return f"{self.source.path}:{self.key}"

    @property
    def number(self) -> str:
        """An id for files that have none."""
        return f"{self.source.path.stem}-{self.key}"

    def wrong(self, reason: str) -> RowError:
        return RowError(FORMAT, reason, self.where)

    def checked(self) -> "Record":
        """The record, which must be an object."""
        if not isinstance(self.raw, dict):
            raise self.wrong(f"expected an object, found {short(self.raw)}.")
        return self

    def take(self, column: str, *kinds: type) -> Any:
        """A field that must be there, of one of these types."""
        value = self.checked().raw.get(column)
        if value is None:
            raise self.wrong(
                f"no field `{column}`. The row has {short(sorted(self.raw), 300)}. Is this the right format?"
            )
        if not isinstance(value, kinds) or isinstance(value, bool):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise wrong_field(column, names, value, self.where)
        if isinstance(value, float) and not is_number(value):
            raise wrong_field(column, "a finite number", value, self.where)
        return value

    def text(self, column: str) -> str:
        """A field that is not blank; numbers become text."""
        text = str(self.take(column, str, int, float)).strip()
        if not text:
            raise self.wrong(f"field `{column}` is empty.")
        return text

    def size(self) -> tuple[int, int]:
        """Its `width` and `height`, in whole pixels."""
        width, height = (self.take(name, int, float) for name in ("width", "height"))
        if min(width, height) < 1 or (width, height) != (int(width), int(height)):
            raise self.wrong(f"image of {width} x {height} pixels.")
        return int(width), int(height)

    def texts(self, column: str) -> list[str]:
        """A list of texts; numbers become text."""
        items = self.take(column, list)
        for item in items:
            if isinstance(item, bool) or not (isinstance(item, str | int) or is_number(item)):
                raise wrong_field(column, "texts", items, self.where)
        return [str(item) for item in items]

    def picture(self, column: str, folder: str = "") -> list[str]:
        return [self.source.image(folder, self.text(column))]

    def letter(self, choices: list[str]) -> str:
        """The `answer`, which must be a letter of one of the choices."""
        letter, known = self.text("answer").strip("(). ").upper(), LETTERS[: len(choices)]
        if len(letter) != 1 or letter not in known:
            raise wrong_field("answer", f"a letter from A to {known[-1:]}", letter, self.where)
        return letter

    def letter_meant(self, choices: list[str]) -> str:
        """The letter of the choice that the `answer` means: its letter in any form (`b`, `(B)`, `B.`, `B. text`), its index
        from 0, its text, or true and false where the choices are yes and no. A capital letter is a letter first, and text
        that is one of the choices means that one."""
        answer, is_text = self.raw["answer"], isinstance(self.raw["answer"], str)
        if is_number(answer) and answer == int(answer):
            answer = str(int(answer))  # an index beside empty ones, as pandas writes it
        elif not isinstance(answer, bool):
            answer = self.text("answer")
        letters = sorted(_letters_meant(answer, choices, is_text))
        if len(letters) == 1:
            return letters[0]
        known = f"a letter from A to {LETTERS[: len(choices)][-1:]}, an index from 0 or one of the choices"
        fault = f"may mean {' or '.join(letters)}: write the letter" if letters else f"is not {known}"
        raise self.wrong(f"field `answer`: {short(answer)} {fault}. The choices are {short(choices, 200)}.")

    def letter_at_index(self, choices: list[str]) -> str:
        """The letter of the choice whose index is the `answer`."""
        index = self.text("answer")
        if not index.isdecimal() or len(index) > 3 or int(index) >= len(choices):
            raise wrong_field("answer", f"an index below {len(choices)}", index, self.where)
        return LETTERS[int(index)]

    def yes_no(self, column: str) -> str:
        answer = self.text(column).lower().rstrip(".")
        if answer not in ("yes", "no"):
            raise wrong_field(column, "yes or no as the truth", self.text(column), self.where)
        return answer

    def people_answers(self, column: str = "answer") -> list[str]:
        """What people answered; a blank answer counts: nobody agrees with it."""
        return [self._replace(raw=item).take(column, str) for item in self.take("answers", list)]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _letters_meant(answer: str | bool, choices: list[str], is_text: bool) -> set[str]:
    texts = option_texts(choices)
    folded = [text.casefold() for text in texts]
    if isinstance(answer, bool):
        words = next((words for words in _BOOLEANS if sorted(folded) == sorted(words)), None)
        return {LETTERS[folded.index(words[answer])]} if words else set()
    if letter := letter_said(answer, len(choices)):
        return {letter}
    same = {i for i, forms in enumerate(zip(choices, texts, strict=True)) if answer in forms}
    same = same or {i for i, choice in enumerate(folded) if choice == answer.casefold()}
    if match := _LETTER.fullmatch(answer):
        same.add(LETTERS.index(match[1].upper()))
    elif answer.isdecimal() and len(answer) < 4 and not (is_text and same):
        same |= {int(answer), *(i for i, choice in enumerate(texts) if _number(choice) == int(answer))}
    elif (match := _LETTERED.fullmatch(answer)) and match[2].casefold() in folded:
        same |= {LETTERS.index(match[1].upper()), folded.index(match[2].casefold())}
    return {LETTERS[i] for i in same if i < min(len(choices), len(LETTERS))}


def objects(source: Source) -> Iterator[Record]:
    """The records of a JSON list, or of an object a line."""
    return (Record(source, number, raw) for number, raw in read_raw(source.path))


def members(source: Source) -> Iterator[Record]:
    """The records of a JSON object of id -> record."""
    return (Record(source, identity, raw).checked() for identity, raw in stream_json_object(source.path))


def arrays(source: Source, *names: str) -> Iterator[tuple[str, Record]]:
    """The lists of those names in a JSON object: (name, record)."""
    for name, number, raw in stream_json_arrays(source.path, names):
        yield name, Record(source, f"{name}[{number}]", raw).checked()


# --- The images of records ---


def picture_path(r: Record, item: Any) -> str:
    """The path, in rows, of an image of a record; one that comes as encoded bytes is written to a file.

    Raises RowError: it is no path and no picture. UserError: there is no folder to write it to.
    """
    from ..images import image_content, store_image

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
    from ..images import boxed_size

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
        raise r.wrong(f"image {short(path, 200)} is not a usable path ({error.strerror}).") from error
    except RowError as error:
        lack = "" if stated else "no `width` and `height`, and its image cannot tell: "
        raise RowError(error.kind, f"{lack}{error.reason}", r.where) from error
    if stated not in (None, size):
        raise r.wrong(
            f"the size is given as {stated[0]} x {stated[1]}, but image {short(path, 200)} has {size[0]} x {size[1]} "
            "pixels. Boxes are in pixels of the upright image: scale them to it."
        )
    known[path, stated] = size
    return size


# --- Which regions are kept ---


@dataclass(frozen=True)
class RegionFilter(Checked):
    """Which region rows are worth describing; every limit None or 0 is off. Raises UserError: a limit out of range."""

    min_side: float = setting(
        0, "Regions: leave out boxes with a side below this, in pixels.", least=0
    )  # the IoU of tiny boxes is noise
    min_area: float = setting(
        0.0, "Regions: leave out boxes below this share of the image (0 to 1).", least=0, most=1
    )
    max_area: float = setting(
        1.0, "Regions: leave out boxes above this share of the image (0 to 1).", least=0, most=1
    )
    # a crowd counts as one, though it is no row (field `crowds`)
    max_same_category: int | None = setting(
        None,
        "Regions: leave out categories with more boxes than this in one image. Default: no limit.",
        least=1,
    )
    max_per_image: int | None = setting(
        None, "Regions: keep only this many boxes of an image, the largest. Default: all.", least=1
    )

    def __post_init__(self):
        super().__post_init__()
        self.require(self.min_area <= self.max_area, "min_area", f"a number <= max_area, {self.max_area}")

    def apply(self, read: Callable[[Counter], Iterator[dict]], notes: Counter) -> Iterator[dict]:
        """Yield the regions kept, in their order; `notes` counts the others by reason.

        Uniqueness is judged before the limits of size: a small twin makes a description ambiguous too. What is unique or
        largest in an image is known when all rows were seen, so then they are read twice, and what is held meanwhile is a
        count and a few areas for each image and category.

        Args:
            read: gives the rows anew at each call, and counts what it leaves out in the counter it is given.

        Raises RowError: a row that is no region, or `max_same_category` and a region without `category`.
        """
        ambiguous, largest = set(), set()
        if self.max_same_category or self.max_per_image:
            ambiguous, largest = self._survey(read(Counter()))
        for number, row in enumerate(read(notes)):
            reason = self._outside(row)
            if reason is None and self._place(row) in ambiguous:
                reason = "category not unique"
            if reason is None and self.max_per_image and number not in largest:
                reason = "more regions than max_per_image"
            if reason is None:
                yield row
            else:
                notes[reason] += 1

    def _survey(self, rows: Iterator[dict]) -> tuple[set[tuple], set[int]]:
        """Images and categories of which there are too many regions; the numbers of the largest rows of each image."""
        counts: Counter = Counter()  # of an image and category: regions, crowds included
        heaps: dict[
            tuple, list[tuple[float, int]]
        ] = {}  # (area, minus the row's number) of the largest of each
        for number, row in enumerate(rows):
            outside, place = self._outside(row), self._place(row)
            # every row of the category knows of all its crowds
            counts[place] += 1 if place in counts else 1 + row.get("crowds", 0)
            if self.max_per_image and outside is None:
                heap = heaps.setdefault(place, [])
                heapq.heappush(heap, (_area(row), -number))
                if len(heap) > self.max_per_image:
                    heapq.heappop(heap)
        most = self.max_same_category
        ambiguous = {place for place, count in counts.items() if most and count > most}
        by_image: dict[str, list[tuple[float, int]]] = {}
        for (image, category), heap in heaps.items():
            if (image, category) not in ambiguous:
                by_image.setdefault(image, []).extend(heap)
        best = (heapq.nlargest(self.max_per_image, pairs) for pairs in by_image.values())
        return ambiguous, {-number for pairs in best for _, number in pairs}

    def _place(self, row: dict) -> tuple[str, str | None]:
        """The image and, where categories are limited, the category of a row."""
        if not self.max_same_category:
            return row["image"], None
        if row.get("category") is None:
            raise RowError(FORMAT, "max_same_category needs the field `category`.", str(row["id"]))
        return row["image"], row["category"]

    def _outside(self, row: dict) -> str | None:
        if row.get("box") is None:
            raise RowError(
                FORMAT,
                "the limits on regions are for region rows, and this row has no `box`.",
                str(row.get("id")),
            )
        x0, y0, x1, y1 = row["box"]
        share = _area(row) / (row["width"] * row["height"])
        if min(x1 - x0, y1 - y0) < self.min_side:
            return "side shorter than min_side"
        if share < self.min_area:
            return "smaller than min_area"
        return "larger than max_area" if share > self.max_area else None


def _area(row: dict) -> float:
    x0, y0, x1, y1 = row["box"]
    return (x1 - x0) * (y1 - y0)
