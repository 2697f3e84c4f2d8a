"""One self-contained HTML page that shows how an answer came about: phrases, doubts, rewinds, hints, costs."""

import base64
import io
import math
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from ..data.tags import Span, TagError, parse
from ..io import write_text
from .answers import Answer

LARGEST_SIDE = 1024
REASONS = {
    "end": "The model ended its answer.",
    "length": "The length limit was reached.",
    "attempts": "All attempts were used up: what follows the verified text stays doubtful.",
    "nothing_left": "Nothing was left to be tried or taken back.",
}


def write_trace_html(answer: Answer, image: Image.Image | list[Image.Image] | None, path: str | Path) -> Path:
    """Write the page for `answer`; images are embedded, nothing is loaded from elsewhere.

    Raises:
        UserError: the file cannot be written.
    """
    pictures = image if isinstance(image, list | tuple) else [image] if image is not None else []
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["log_place"] = log_place
    template = environment.from_string(
        resources.files(__package__).joinpath("templates/trace.html.j2").read_text(encoding="utf-8")
    )
    page = template.render(
        answer=answer,
        images=[data_uri(picture) for picture in pictures],
        pieces=answer_pieces(answer),
        rounds=rounds(answer),
        threshold=answer.threshold,
        numbers=numbers(answer),
    )
    return write_text(path, page)


def log_place(p: float) -> float:
    """Where a probability stands on the bar, in percent: 1e-6 at the left end, 1 at the right."""
    return 100 * (1 + math.log10(min(max(p, 1e-6), 1.0)) / 6)


def data_uri(image: Image.Image) -> str:
    image = image.convert("RGB")
    if max(image.size) > LARGEST_SIDE:
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def answer_pieces(answer: Answer) -> list[dict[str, Any]]:
    """The answer as running text and judged phrases, in order."""
    try:
        parsed = parse(answer.tagged_text)
    except TagError:
        return [{"text": answer.text, "span": None}]  # cut inside a phrase: no pairs of tags to draw
    records = iter(answer.spans)
    pieces: list[dict[str, Any]] = []
    for piece in parsed:
        if isinstance(piece, Span):
            pieces.append({"text": piece.phrase, "span": next(records, None)})
        else:
            pieces.append({"text": piece.text, "span": None})
    return pieces


def rounds(answer: Answer) -> list[dict[str, Any]]:
    """The trace with each rejection joined to what was done about it, ready to draw."""
    drawn: list[dict[str, Any]] = []
    for event in answer.trace:
        kind = event["kind"]
        if kind in ("local_rewind", "sentence_rewind") and drawn and drawn[-1]["kind"] == "reject":
            drawn[-1]["rewind"] = event
        elif kind == "hint" and drawn and drawn[-1]["kind"] == "reject":
            drawn[-1]["hint"] = event["text"]
        elif kind == "finish":
            drawn.append({**event, "text": REASONS.get(event["reason"], event["reason"])})
        else:
            drawn.append(dict(event))
    return drawn


def numbers(answer: Answer) -> list[tuple[str, str]]:
    """The counts to print, with their labels."""
    counts, trace = answer.counts, answer.trace
    kinds = [event["kind"] for event in trace]
    per_token = counts.tokens_forwarded / counts.tokens_kept if counts.tokens_kept else 0.0
    return [
        ("rejected phrases", str(kinds.count("reject"))),
        ("rewinds to the last phrase", str(kinds.count("local_rewind"))),
        ("rewinds to a sentence", str(kinds.count("sentence_rewind"))),
        ("tokens kept", str(counts.tokens_kept)),
        ("tokens forwarded", f"{counts.tokens_forwarded} (prompt {counts.prompt_tokens})"),
        ("forwarded per kept token", f"{per_token:.2f}"),
        ("forward passes", str(counts.forwards)),
        ("image encodes", str(counts.image_encodes)),
    ]
