"""What every report is made of: intervals as text, tables for page and terminal, figures, galleries, and one HTML page.

Nothing is fetched when a page is opened; pictures are data URIs; it follows the reader's light or dark setting and fits a
phone. Text is escaped, so an answer cannot change the page.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from rich.markup import escape
from rich.table import Table as TerminalTable
from rich.text import Text as TerminalText

from ..data.images import open_image
from ..errors import printable
from ..io import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

TEMPLATES = Path(__file__).parent / "templates"
_THUMBNAIL = 320  # pixels on the longer side, for sharp 160-pixel pictures on dense screens
_SMALL = 160  # in tables
_STYLES = {"plain": "", "good": "bold green", "bad": "red", "muted": "dim", "strong": "bold"}


def interval_text(interval: Mapping[str, float], digits: int = 3, scale: float = 1, sign: str = "") -> str:
    """`0.612 [0.587, 0.636]` of a map with `value`, `low` and `high`; `sign="+"` shows the sign of positive ones too."""
    value, low, high = (f"{scale * interval[key]:{sign}.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def percent(interval: Mapping[str, float]) -> str:
    """`61.2 [58.7, 63.6]` of shares."""
    return interval_text(interval, digits=1, scale=100)


# --- What stands on a page, in sections ---


@dataclass(frozen=True)
class Text:
    """Paragraphs, separated by blank lines in `body`."""

    kind: ClassVar = "text"
    title: str
    body: str

    @property
    def paragraphs(self) -> list[str]:
        return [part.strip() for part in self.body.split("\n\n") if part.strip()]


@dataclass(frozen=True)
class Tile:
    """One headline figure; `tone` colours the value."""

    label: str
    value: str
    note: str = ""
    tone: Literal["plain", "good", "bad"] = "plain"


@dataclass(frozen=True)
class Tiles:
    kind: ClassVar = "tiles"
    title: str
    tiles: Sequence[Tile]


@dataclass(frozen=True)
class Cell:
    """A table cell with emphasis; plain text is accepted too."""

    text: str
    tone: Literal["plain", "good", "bad", "muted", "strong"] = "plain"


@dataclass(frozen=True)
class Table:
    """Rows of text. The first column is left-aligned, the others right-aligned where `numeric`; an empty row is a line."""

    kind: ClassVar = "table"
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    note: str = ""
    numeric: bool = True
    folded: bool = False

    @property
    def cells(self) -> list[list[Cell]]:
        return [[cell if isinstance(cell, Cell) else Cell(str(cell)) for cell in row] for row in self.rows]

    def terminal(self) -> TerminalTable:
        """The same table for a terminal."""
        title, note = (escape(printable(text)) for text in (self.title, self.note))
        table = TerminalTable(title=title, caption=note or None)
        for place, name in enumerate(self.columns):
            table.add_column(escape(printable(name)), justify="right" if place and self.numeric else "left")
        for row in self.cells:
            if row:
                table.add_row(*(TerminalText(printable(cell.text), _STYLES[cell.tone]) for cell in row))
            else:
                table.add_section()
        return table


@dataclass(frozen=True)
class Figure:
    """A plot: `draw(dark=…)` makes a matplotlib figure, once for each colour scheme (`partial(plots.roc, verdicts)`)."""

    kind: ClassVar = "figure"
    title: str
    draw: "Callable[..., MatplotlibFigure]"
    caption: str = ""


@dataclass(frozen=True)
class Panels:
    """Small plots side by side, as many in a line as the window has room for; title -> `draw(dark=…)`.

    `wide`: plots with names along an axis need twice the room.
    """

    kind: ClassVar = "panels"
    title: str
    panels: "Mapping[str, Callable[..., MatplotlibFigure]]"
    caption: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Piece:
    """A stretch of an answer.

    Attributes:
        truth: right, wrong, or None where nothing is judged.
        p_unconfident: the verifier's P(</UN>), None outside tagged phrases.
        accepted: the verifier's verdict.
    """

    text: str
    truth: bool | None = None
    p_unconfident: float | None = None
    accepted: bool | None = None


@dataclass(frozen=True)
class AnswerView:
    """What one system answered; `missed`: what it should have named."""

    system: str
    pieces: Sequence[Piece]
    note: str = ""
    missed: Sequence[str] = ()


@dataclass(frozen=True)
class Example:
    """A picture with one or several systems' answers; `image` is a path, a PIL image, or None.

    `link` makes `note` a link to a page beside this one (a relative path).
    """

    image: str | Path | Image.Image | None
    question: str
    answers: Sequence[AnswerView]
    note: str = ""
    link: str = ""


@dataclass(frozen=True)
class Gallery:
    kind: ClassVar = "gallery"
    title: str
    examples: Sequence[Example]
    note: str = ""
    legend: bool = True
    legend_words: tuple[str, str] = ("in the picture", "not in the picture")


@dataclass(frozen=True)
class BrowserRow:
    """One question in a `Browser`.

    Attributes:
        verdict: one word; the rows can be filtered by it.
        badness: sorts the rows from best to worst.
        categories: the question's categories, another filter.
        link, link_text: a page beside this one about the answer.
    """

    id: str
    image: str | Path | Image.Image | None
    question: str
    truth: str
    answers: Sequence[AnswerView]
    verdict: str
    badness: float
    categories: Sequence[str] = ()
    link: str = ""
    link_text: str = "trace"


@dataclass(frozen=True)
class Browser:
    """All questions as a table that the reader sorts and filters; it is the only part of a page with a script."""

    kind: ClassVar = "browser"
    title: str
    rows: Sequence[BrowserRow]
    note: str = ""

    @property
    def verdicts(self) -> list[str]:
        return sorted({row.verdict for row in self.rows})

    @property
    def categories(self) -> list[str]:
        return sorted({name for row in self.rows for name in row.categories})

    def pictures(self) -> tuple[list[str], list[int | None]]:
        """Small pictures as data URIs, each once, and for every row the place of its picture."""
        uris: dict[str, int] = {}
        places: list[int | None] = []
        for row in self.rows:
            uri = thumbnail_uri(row.image, _SMALL) if row.image is not None else None
            places.append(None if uri is None else uris.setdefault(uri, len(uris)))
        return list(uris), places


Section = Text | Tiles | Table | Figure | Panels | Gallery | Browser


# --- The page ---


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def thumbnail_uri(image: str | Path | Image.Image, longest: int = _THUMBNAIL) -> str:
    """A picture as a data URI, scaled down (never up) to thumbnail size; PNG for small ones, else JPEG."""
    picture, buffer = open_image(image), io.BytesIO()
    if max(picture.size) <= longest:
        picture.save(buffer, "PNG", optimize=True)
        return _uri("png", buffer.getvalue())
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    picture.save(buffer, "JPEG", quality=85)
    return _uri("jpeg", buffer.getvalue())


def figure_uri(figure: "MatplotlibFigure") -> str:
    """A matplotlib figure as an SVG data URI with a transparent background."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "vlm-sft-rl"}):  # the same figure gives the same bytes
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    return _uri("svg+xml", buffer.getvalue())


def _slug(title: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in title.lower()).strip("-") or "section"


def render_report(
    title: str, sections: Sequence[Section], path: str | Path, *, subtitle: str = "", command: str = ""
) -> Path:
    """Write the page and return its path.

    Args:
        title: heading and browser title.
        sections: in order; sections without a title belong to the one before.
        path: where to write; replaced as a whole.
        subtitle: one line below the heading.
        command: what makes the page again, for its last line.

    Raises UserError: a picture cannot be opened, or the file cannot be written.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"thumbnail_uri": thumbnail_uri, "figure_uri": figure_uri, "slug": _slug}
    page = environment.get_template("report.html.j2").render(
        title=title,
        subtitle=subtitle,
        sections=list(sections),
        style=(TEMPLATES / "style.css").read_text(encoding="utf-8"),
        script=(TEMPLATES / "browser.js").read_text(encoding="utf-8"),
        command=command,
        time=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    return write_text(path, page)
