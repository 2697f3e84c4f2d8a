"""One row as training sees it: every token with its role, its loss and its weight."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..errors import UserError
from .chat import load_processor
from .collators import VisionCollator
from .corrections import superseded_mark
from .fields import identity_of
from .images import image_root_of, open_image
from .marks import IGNORE, Example, Mark, verification_marks
from .rows import (
    PREFERENCE,
    QUESTION,
    REGION,
    preference_row,
    question_row,
    question_text,
    read_raw,
    region_row,
    row_kind,
    sft_row,
    sides,
)

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
    row: dict,
    processor: Any,
    marks: Sequence[Mark] = (),
    image_root: Any = None,
    name: str = "",
    **collator_options: Any,
) -> Group:
    """A rich renderable of one conversation: stretches of equal role, loss and weight, their tokens set apart by `|`.

    Blanks are shown as `·`, line breaks as `⏎`; runs of image tokens as `<image> ×576`.

    Args:
        name: what to call it; by default the row's id.

    Raises RowError: the row cannot be trained on (see `VisionCollator`); without an answer it is shown all the same.
    """
    collator = VisionCollator(processor, image_root, marks=marks, **collator_options)
    if any(message["role"] == "assistant" for message in row["messages"]):
        example = collator.encode(row)
    else:
        example = collator.process([collator.prepare(row)])[1][0]
    tokens = list(preview_tokens(example, processor))
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for heading, justify in (("tokens", "right"), ("role", "left"), ("loss", "left"), ("weight", "right")):
        table.add_column(heading, justify=justify, no_wrap=True)
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
    summary = (
        f"{name or 'row ' + str(row.get('id', '?'))}: {len(example.input_ids)} tokens, {learnt} with loss, "
    )
    summary += f"total weight {sum(example.weights):g}"
    return Group(Text(summary, "bold"), table, _legend())


RegionViews = Callable[[str | Path, Any, dict], Iterator[tuple[str, dict, int]]]


def preview_file(
    path: str | Path,
    model: str | Path,
    row: str | int = 0,
    image_root: str | Path | None = None,
    regions: RegionViews | None = None,
) -> None:
    """Print the preview of one row of a file of any kind, with the verification mark where the model has the tokens.

    Args:
        row: position in the file from 0, or a row's id.
        image_root: by default the folder of the file.
        regions: `(model, processor, opened region row) -> (name, conversation, characters given)` for each question.

    Raises UserError: no such row or file, or the model has no processor. RowError: the row cannot be trained on.
    """
    from rich.console import Console

    processor = load_processor(model)
    root = image_root_of(path, image_root)
    count = 0
    for count, (number, raw) in enumerate(read_raw(path), 1):
        where = f"{path}:{number}"
        if str(row) in (str(count - 1), identity_of(raw, where)):
            for name, conversation, marks in _views(raw, where, model, processor, root, regions):
                Console().print(preview(conversation, processor, marks, root, name))
            return
    raise UserError(f"{path}: no row {str(row)!r}. Give a position from 0 to {count - 1}, or a row's id.")


def _views(
    raw: dict, where: str, model: str | Path, processor: Any, root: Path, regions: RegionViews | None
) -> Iterator[tuple[str, dict, list[Mark]]]:
    """The conversations that a row of any kind is to a model: name, SFT row, marks."""
    kind = row_kind(raw)
    if kind == PREFERENCE:
        pair = preference_row(raw, where)
        for name, side in zip(("chosen", "rejected"), sides(pair), strict=True):
            yield f"{pair['pair_kind']} pair {pair['id']}, weight {pair['pair_weight']:g}, {name}", side, []
    elif kind == REGION and regions is not None:
        picture = open_image(region_row(raw, where)["image"], root)
        opened = {**region_row(raw, where, picture.size), "picture": picture}
        for name, conversation, given in regions(model, processor, opened):
            yield name, conversation, [partial(_given_mark, characters=given)]
    elif kind == QUESTION and raw.get("answer") is None:
        question = question_row(raw, where)
        message = {"role": "user", "content": question_text(question)}
        yield "", {"id": question["id"], "images": question["images"], "messages": [message]}, []
    else:
        yield "", sft_row(raw, where), [*verification_marks(processor.tokenizer), superseded_mark]


def _given_mark(example: Example, *, characters: int) -> Example:
    """No loss on what of an answer is given: its first characters."""
    labels, weights = list(example.labels), list(example.weights)
    for turn in example.turns:
        for place, at in turn.places():
            if at < characters:
                labels[place], weights[place] = IGNORE, 0.0
    return replace(example, labels=labels, weights=weights)


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
