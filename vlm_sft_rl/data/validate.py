"""Finding out before training what would go wrong in it."""

import copy
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..errors import DUPLICATE_ID, FORMAT, NO_SUPERVISION, TAGS, RowError, UserError, printable
from ..io import require_file, row_progress
from .corrections import Layout, is_correction_row, lay_out, superseded_mark
from .images import boxed_size, image_root_of, open_image
from .messages import typed_messages
from .rows import (
    PREFERENCE,
    QUESTION,
    REGION,
    SFT,
    preference_row,
    question_row,
    read_raw,
    region_row,
    row_kind,
    sft_row,
    sides,
)
from .tags import CONFIDENT, OPEN, UNCONFIDENT, TagCounts, TagError, spans, tag_shortage

EXAMPLES = 3
BROKEN_FILE = "broken file"
TOKENS_MISSING = "tokenizer lacks verification tokens"
WITHOUT_IMAGE = "no image"
TWICE = "key `{}` twice in one object, of which the last counts,"
WITHOUT_ANSWER = "no `answer`, which self-training and GRPO need,"
NOT_STAGED = "drafts without stages, which `layout: stage` refuses,"


@dataclass
class Problem:
    """One kind of problem: how many rows have it, and the first few (`file:row: what`)."""

    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What `validate` found; printed by rich it is a page.

    Attributes:
        path: the file.
        rows: rows read.
        kinds: how many of each kind.
        images: distinct images checked.
        problems: kind -> Problem.
        lengths: tokens of each row that could be tokenised, images included; empty without a processor.
        tags: phrases by verdict ("confident", "unconfident") and "tagged answers", "answers".
        notes: what is no fault but may not be meant: fields that are not known, turns left out, rows without images.
        remarks: what is to be said of the file as a whole.
    """

    path: str
    rows: int = 0
    kinds: Counter = field(default_factory=Counter)
    images: int = 0
    problems: dict[str, Problem] = field(default_factory=dict)
    lengths: array = field(default_factory=lambda: array("L"))
    tags: Counter = field(default_factory=Counter)
    notes: Counter = field(default_factory=Counter)
    remarks: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.rows > 0 and not self.problems

    def add(self, kind: str, where: str, reason: str) -> None:
        problem = self.problems.setdefault(kind, Problem())
        problem.count += 1
        if len(problem.examples) < EXAMPLES:
            problem.examples.append(f"{where}: {reason}" if where else reason)

    def histogram(self, buckets: int = 10) -> list[tuple[int, int, int]]:
        """Token lengths as `(from, to, rows)`, both ends included."""
        if not self.lengths:
            return []
        low, high = min(self.lengths), max(self.lengths)
        width = max(1, -(-(high - low + 1) // buckets))
        counts = Counter((n - low) // width for n in self.lengths)
        return [
            (low + i * width, low + (i + 1) * width - 1, counts[i]) for i in range((high - low) // width + 1)
        ]

    def to_json(self) -> dict:
        return {
            "path": self.path,
            "ok": self.ok,
            "rows": self.rows,
            "kinds": dict(self.kinds),
            "images": self.images,
            "problems": {k: {"count": p.count, "examples": p.examples} for k, p in self.problems.items()},
            "lengths": [{"from": a, "to": b, "rows": n} for a, b, n in self.histogram()],
            "tags": dict(self.tags),
            "notes": dict(self.notes),
            "remarks": self.remarks,
        }

    def __rich__(self) -> Group:
        verdict = Text("OK", "bold green") if self.ok else Text("NOT READY", "bold red")
        kinds = " and ".join(f"{count} {kind}" for kind, count in self.kinds.items()) or self.rows
        head = Text(printable(f"{self.path}: {kinds} rows, {self.images} images  ")) + verdict
        if not self.rows:
            head.append("\nThe file has no rows.", "red")
        for note, count in self.notes.items():
            head.append(printable(f"\nnote: {note} in {count} rows"), "yellow")
        for remark in self.remarks:
            head.append(printable(f"\nnote: {remark}"), "yellow")
        parts: list[Any] = [head]
        if self.problems:
            table = Table(title="Problems", title_justify="left", show_lines=True)
            table.add_column("kind", style="bold red")
            table.add_column("rows", justify="right")
            table.add_column("first examples", overflow="fold")
            for kind, problem in sorted(self.problems.items(), key=lambda item: -item[1].count):
                table.add_row(kind, str(problem.count), Text(printable("\n".join(problem.examples))))
            parts.append(table)
        if self.lengths:
            title = "Tokens per row, images included"
            table = Table(title=title, title_justify="left", box=None, show_header=False)
            table.add_column(justify="right")
            table.add_column(justify="right")
            table.add_column(style="cyan")
            buckets = self.histogram()
            most = max(count for *_, count in buckets)
            for low, high, count in buckets:
                table.add_row(f"{low}-{high}", str(count), "█" * -(-40 * count // most))
            parts.append(table)
        if total := self.tags["confident"] + self.tags["unconfident"]:
            parts.append(
                Text(
                    f"Tags: {self.tags['confident']} confident and {self.tags['unconfident']} unconfident phrases "
                    f"({100 * self.tags['unconfident'] / total:.1f} % unconfident) in {self.tags['tagged answers']} of "
                    f"{self.tags['answers']} answers"
                )
            )
        return Group(*parts)


def validate(
    rows_path: str | Path,
    processor_or_path: Any = None,
    image_root: str | Path | None = None,
    max_length: int | None = None,
    tags: bool = True,
    limit: int | None = None,
    progress: bool = True,
) -> Report:
    """Check every row of a file of any kind by the reader that its users read it with.

    Without a processor: fields, placeholders, images, tags, ids, empty answers. With one, also everything
    that needs tokens: length, supervised tokens, the chat template, the processor itself.

    Args:
        rows_path: JSON array or JSONL of rows of one kind.
        processor_or_path: a processor, or the folder of a model.
        image_root: folder of the images; by default the folder of the file.
        max_length: limit in tokens, images included (needs a processor).
        tags: check that verification tags pair up.
        limit: look at the first rows only.
        progress: show a progress bar on standard error.

    Raises UserError: the file cannot be opened, or the processor cannot be loaded. What is wrong *in* the file is in
    the report.
    """
    path = Path(rows_path)
    require_file(path)
    root = image_root_of(path, image_root)
    if max_length is not None and processor_or_path is None:
        raise UserError("max_length counts tokens: give the model (or its processor) as well.")
    check = _Check(Report(str(path)), root, tags, _collator(processor_or_path, root, tags), max_length)
    repeated: Counter = Counter()
    with row_progress(progress, f"checking {path.name}") as advance:
        try:
            for number, raw in read_raw(path, repeated):
                check.row(raw, f"{path}:{number}")
                advance()
                if limit is not None and check.report.rows >= limit:
                    break
        except UserError as error:
            check.report.add(BROKEN_FILE, "", str(error))
    check.report.notes.update({TWICE.format(key[:60]): count for key, count in repeated.items()})
    check.finish()
    return check.report


def _collator(processor_or_path: Any, root: Path, tags: bool) -> Any:
    if processor_or_path is None:
        return None
    from .chat import load_processor
    from .collators import VisionCollator
    from .marks import verification_marks

    is_path = isinstance(processor_or_path, str | Path)
    processor = load_processor(processor_or_path) if is_path else processor_or_path
    marks = verification_marks(processor.tokenizer) if tags else []
    return VisionCollator(processor, root, marks=[*marks, superseded_mark])


class _Check:
    """What is wrong with each row, added to the report; an image is opened once."""

    def __init__(self, report: Report, root: Path, tags: bool, collator: Any, max_length: int | None):
        self.report, self.root, self.tags = report, root, tags
        self.collator, self.max_length = collator, max_length
        self.ids: set[int] = set()
        self.images: dict[str, tuple[int, int] | RowError] = {}  # path -> size, or what is wrong with it

    def row(self, raw: dict, where: str) -> None:
        self.report.rows += 1
        kind = row_kind(raw)
        self.report.kinds[kind] += 1
        try:
            row, conversations = self._read(kind, raw, where)
        except RowError as error:
            self.report.add(error.kind, error.where, error.reason)
            return
        self._note_id(row["id"], where)
        images = [row["image"]] if kind == REGION else row["images"]
        self.report.notes[WITHOUT_IMAGE] += not images
        is_good = self._note_all(where, self._image_problems(images))
        if kind == REGION and is_good:
            self._note_all(where, self._size_problems(raw, where, images[0]))
        for conversation in conversations:
            # no verdict is learnt from a pair, so nobody asks whether its tags match
            tags = self.tags and kind != PREFERENCE
            if self._note_all(where, self._text_problems(conversation, tags)) and is_good and self.collator:
                collator = copy.copy(self.collator)
                collator.marks = self.collator.marks if tags else ()
                self._note_all(where, self._token_problems(conversation, collator))

    def _read(self, kind: str, raw: dict, where: str) -> tuple[dict, list[dict]]:
        """The row as its kind's reader gives it, and the conversations that it is to a trainer. Raises RowError."""
        notes = self.report.notes
        if kind == PREFERENCE:
            pair = preference_row(raw, where, notes)
            return pair, [side | {"source": where} for side in sides(pair)]
        if kind == REGION:
            return region_row(raw, where, notes=notes), []
        if kind == QUESTION:
            question = question_row(raw, where, notes)
            is_answered = question.get("answer") is not None
            notes[WITHOUT_ANSWER] += not is_answered
            return question, [sft_row(raw, where)] if is_answered else []
        row = sft_row(raw, where, notes)
        if is_correction_row(row):
            try:
                lay_out(row, Layout("stage"))
            except RowError:
                notes[NOT_STAGED] += 1
        return row, [row]

    def finish(self) -> None:
        """What can be said of the file as a whole."""
        report, kinds = self.report, self.report.kinds
        report.images = len(self.images)
        report.notes = +report.notes  # without those that nothing has
        if len(kinds) > 1 and (set(kinds) != {SFT, QUESTION} or report.notes[WITHOUT_ANSWER]):
            counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
            report.add(
                FORMAT, "", f"rows of several kinds in one file ({counts}). Put each kind in its own file."
            )
        shortage = tag_shortage(
            TagCounts(
                *(report.tags[name] for name in ("answers", "tagged answers", "confident", "unconfident"))
            )
        )
        if self.tags and report.tags["answers"] and shortage and not report.problems:
            report.remarks.append(f"for the method reverse: {shortage}")

    def _note_all(self, where: str, *problems: Iterator[tuple[str, str]]) -> bool:
        """Add problems to the report; returns whether there are none."""
        count = 0
        for kind, reason in (problem for part in problems for problem in part):
            self.report.add(kind, where, reason)
            count += 1
        return not count

    def _note_id(self, identity: Any, where: str) -> None:
        if hash(identity) in self.ids:
            self.report.add(DUPLICATE_ID, where, f"the id {identity!r} was used before. Make ids unique.")
        self.ids.add(hash(identity))

    def _image_problems(self, images: list) -> Iterator[tuple[str, str]]:
        """What is wrong with the first bad image."""
        for image in images:
            state = self.images.get(image) if isinstance(image, str) else None
            if state is None:
                try:
                    state = open_image(image, self.root).size
                except RowError as error:
                    state = error
                if isinstance(image, str):
                    self.images[image] = state
            if isinstance(state, RowError):
                yield state.kind, state.reason
                return

    def _size_problems(self, raw: dict, where: str, image: Any) -> Iterator[tuple[str, str]]:
        try:
            region_row(raw, where, boxed_size(image, self.root, (raw["width"], raw["height"])))
        except RowError as error:
            yield error.kind, error.reason

    def _text_problems(self, row: dict, tags: bool) -> Iterator[tuple[str, str]]:
        answers = [m for m in row["messages"] if m["role"] == "assistant"]
        if not any(_teaches(m) for m in answers):
            yield (
                NO_SUPERVISION,
                "no assistant message, or nothing is learnt from any (weight 0, or verdicts without a tag).",
            )
        try:
            typed_messages(row)
        except RowError as error:
            yield error.kind, error.reason
        if tags:
            yield from self._tag_problems(answers)

    def _tag_problems(self, answers: list[dict]) -> Iterator[tuple[str, str]]:
        counts, problem, tagged = self.report.tags, None, False
        for message in answers:
            counts["answers"] += 1
            try:
                phrases = spans(message["content"])
            except TagError as error:
                problem = problem or str(error)
                continue
            counts["tagged answers"] += bool(phrases)
            counts["confident"] += sum(p.confident for p in phrases)
            counts["unconfident"] += sum(not p.confident for p in phrases)
            tagged = tagged or bool(phrases)
        if problem:
            yield TAGS, problem
        elif tagged and self.collator is not None and self.collator.marks == (superseded_mark,):
            yield (
                TOKENS_MISSING,
                f"{OPEN} … is not one token in this model. Run `vlm-sft-rl model prepare` and use the folder it writes.",
            )

    def _token_problems(self, row: dict, collator: Any) -> Iterator[tuple[str, str]]:
        from .collators import check_length

        try:
            length = len(collator.encode(row).input_ids)
            self.report.lengths.append(length)
            check_length(length, self.max_length)
        except RowError as error:
            yield error.kind, error.reason


def _teaches(message: dict) -> bool:
    if (
        message.get("supervise") == "verdicts"
        and CONFIDENT not in (text := message["content"])
        and UNCONFIDENT not in text
    ):
        return False
    return message.get("weight", 1) != 0
