"""One row as training sees it: every token with its role, its loss and its weight."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..errors import UserError
from .chat import load_processor
from .collators import VisionCollator
from .images import image_root_of
from .marks import IGNORE, Example, Mark, verification_marks
from .rows import read_rows

STYLES = {"template": "dim", "system": "magenta", "user": "cyan", "image": "yellow", "assistant": "white"}
LOSS = "bold white on dark_green"
LONGEST_IMAGE_RUN = 3
BREAKS = str.maketrans({"\n": "⏎", "\t": "⇥", " ": "·"})


@dataclass(frozen=True)
class Token:
    """One line of `preview_tokens`: `count` equal tokens in a row (more than one only for image tokens)."""

    index: int
    text: str
    role: str
    loss: bool
    weight: float
    count: int = 1


def preview(
    row: dict, processor: Any, marks: Sequence[Mark] = (), image_root: Any = None, **collator_options: Any
) -> Group:
    """A rich renderable of one row: stretches of equal role, loss and weight, their tokens set apart by `|`.

    Blanks are shown as `·`, line breaks as `⏎`; runs of image tokens as `<image> ×576`.

    Raises RowError: the row cannot be trained on (see `VisionCollator`).
    """
    collator = VisionCollator(processor, image_root, marks=marks, **collator_options)
    example = collator.encode(row)
    tokens = list(preview_tokens(example, processor))
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for name, justify in (("tokens", "right"), ("role", "left"), ("loss", "left"), ("weight", "right")):
        table.add_column(name, justify=justify, no_wrap=True)
    table.add_column("text", overflow="fold")
    for (role, loss, weight), run in groupby(tokens, key=lambda t: (t.role, t.loss, t.weight)):
        stretch = list(run)
        first, last = stretch[0].index, stretch[-1].index + stretch[-1].count - 1
        table.add_row(
            str(first) if first == last else f"{first}-{last}",
            Text(role, STYLES[role]),
            Text("yes", "green") if loss else Text("-", "dim"),
            f"{weight:g}" if loss else "",
            _stretch(stretch, LOSS if loss else STYLES[role]),
        )
    learnt = sum(label != IGNORE for label in example.labels)
    summary = f"row {row.get('id', '?')}: {len(example.input_ids)} tokens, {learnt} with loss, "
    summary += f"total weight {sum(example.weights):g}"
    return Group(Text(summary, "bold"), table, _legend())


def preview_file(
    path: str | Path, model: str | Path, row: str | int = 0, image_root: str | Path | None = None
) -> None:
    """Print the preview of one row of a training file, with the verification mark where the model has the
    tokens.

    Args:
        row: position in the file from 0, or a row's id.
        image_root: by default the folder of the file.

    Raises UserError: no such row or file, or the model has no processor. RowError: the row cannot be trained on.
    """
    from rich.console import Console

    processor = load_processor(model)
    marks = verification_marks(processor.tokenizer)
    count = 0
    for count, candidate in enumerate(read_rows(path), 1):
        if str(row) in (candidate["id"], str(count - 1)):
            Console().print(preview(candidate, processor, marks, image_root_of(path, image_root)))
            return
    raise UserError(f"{path}: no row {str(row)!r}. Give a position from 0 to {count - 1}, or a row's id.")


def preview_tokens(example: Example, processor: Any) -> Iterator[Token]:
    """The tokens of an example with role, loss and weight; runs of one image token are folded."""
    tokenizer = processor.tokenizer
    image_ids = set(
        getattr(processor, "image_token_ids", None) or [getattr(processor, "image_token_id", None)]
    )
    roles = ["template"] * len(example.input_ids)
    for turn in (*example.prompts, *example.turns):
        roles[turn.start : turn.end] = [turn.message["role"]] * (turn.end - turn.start)
    index = 0
    for token, run in groupby(example.input_ids):
        count = len(list(run))
        text = tokenizer.decode([token])
        folded = token in image_ids and count > LONGEST_IMAGE_RUN
        for i in range(index, index + (1 if folded else count)):
            role = "image" if token in image_ids else roles[i]
            loss = example.labels[i] != IGNORE
            yield Token(i, text, role, loss, example.weights[i], count if folded else 1)
        index += count


def _stretch(tokens: list[Token], style: str) -> Text:
    text = Text()
    for k, token in enumerate(tokens):
        text.append("|" if k else "", "dim")
        text.append(token.text.translate(BREAKS), style)
        text.append(f" ×{token.count}" if token.count > 1 else "", "bold")
    return text


def _legend() -> Text:
    text = Text("\n")
    text.append(" loss ", LOSS)
    for role, style in STYLES.items():
        text.append(f"  {role}", style)
    return text.append("\n · blank   ⏎ line break   | between tokens   ×n equal tokens", "dim")
