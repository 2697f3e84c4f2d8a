"""One self-contained HTML page from a list of sections: text, headline figures, tables, plots, galleries.

Nothing is fetched when the page is opened; pictures are data URIs; it follows the reader's light or dark setting and
fits a phone. Text is escaped, so an answer cannot change the page.
"""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from ..data.images import open_image
from ..io import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

TEMPLATES = Path(__file__).parent / "templates"
_THUMBNAIL = 320  # pixels on the longer side, for sharp 160-pixel pictures on dense screens
_SMALL = 160  # in tables


@dataclass(frozen=True)
class Text:
    """Paragraphs, separated by blank lines in `body`."""

    title: str
    body: str
    kind: str = "text"

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
    title: str
    tiles: Sequence[Tile]
    kind: str = "tiles"


@dataclass(frozen=True)
class Cell:
    """A table cell with emphasis; plain text is accepted too."""

    text: str
    tone: Literal["plain", "good", "bad", "muted", "strong"] = "plain"

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Table:
    """Rows of text. The first column is left-aligned, the others right-aligned where `numeric`."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    note: str = ""
    numeric: bool = True
    folded: bool = False
    kind: str = "table"

    @property
    def cells(self) -> list[list[Cell]]:
        return [[cell if isinstance(cell, Cell) else Cell(str(cell)) for cell in row] for row in self.rows]


@dataclass(frozen=True)
class Figure:
    """A plot. `draw(dark)` makes a matplotlib figure; it is called once for each of the two colour schemes."""

    title: str
    draw: "Callable[[bool], MatplotlibFigure]"
    caption: str = ""
    kind: str = "figure"


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
    """What one system said."""

    system: str
    pieces: Sequence[Piece]
    note: str = ""


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
    title: str
    examples: Sequence[Example]
    note: str = ""
    legend: bool = True
    legend_words: tuple[str, str] = ("in the picture", "not in the picture")
    kind: str = "gallery"


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

    title: str
    rows: Sequence[BrowserRow]
    note: str = ""
    kind: str = "browser"

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


Section = Text | Tiles | Table | Figure | Gallery | Browser


@dataclass(frozen=True)
class Footer:
    """The line at the end: how to make the page again."""

    command: str = ""
    made: datetime = field(default_factory=lambda: datetime.now(UTC))


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def thumbnail_uri(image: str | Path | Image.Image, longest: int = _THUMBNAIL) -> str:
    """A picture as a data URI, scaled down (never up) to thumbnail size; PNG for small ones, else JPEG."""
    picture = open_image(image)
    small = max(picture.size) <= longest
    if not small:
        picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if small:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", quality=85)
    return _uri("png" if small else "jpeg", buffer.getvalue())


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
    title: str,
    sections: Sequence[Section],
    path: str | Path,
    *,
    subtitle: str = "",
    footer: Footer | None = None,
) -> Path:
    """Write the page and return its path.

    Args:
        title: heading and browser title.
        sections: in order; sections without a title belong to the one before.
        path: where to write; replaced as a whole.
        subtitle: one line below the heading.
        footer: how the page was made; default only the time.

    Raises:
        UserError: a picture cannot be opened, or the file cannot be written.
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
        footer=footer or Footer(),
    )
    return write_text(path, page)
