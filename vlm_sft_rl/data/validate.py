"""Finding out before training what would go wrong in it."""

from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..errors import DUPLICATE_ID, EMPTY_ANSWER, NO_SUPERVISION, TAGS, RowError, UserError
from ..io import row_progress
from .images import image_root_of, open_image
from .rows import question_row, read_raw, region_row, row_kind, sft_row, typed_messages
from .tags import OPEN, TagError, spans

EXAMPLES = 3
BROKEN_FILE = "broken file"
TOKENS_MISSING = "tokenizer lacks verification tokens"


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
        images: distinct images checked.
        problems: kind -> Problem.
        lengths: tokens of each row that could be tokenised, images included; empty without a processor.
        tags: phrases by verdict ("confident", "unconfident") and "tagged answers", "answers".
        notes: what reading left out (a leading assistant turn).
    """

    path: str
    rows: int = 0
    images: int = 0
    problems: dict[str, Problem] = field(default_factory=dict)
    lengths: array = field(default_factory=lambda: array("L"))
    tags: Counter = field(default_factory=Counter)
    notes: Counter = field(default_factory=Counter)

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
            "images": self.images,
            "problems": {k: {"count": p.count, "examples": p.examples} for k, p in self.problems.items()},
            "lengths": [{"from": a, "to": b, "rows": n} for a, b, n in self.histogram()],
            "tags": dict(self.tags),
            "notes": dict(self.notes),
        }

    def __rich__(self) -> Group:
        verdict = Text("OK", "bold green") if self.ok else Text("NOT READY", "bold red")
        head = Text(f"{self.path}: {self.rows} rows, {self.images} images  ") + verdict
        if not self.rows:
            head.append("\nThe file has no rows.", "red")
        for note, count in self.notes.items():
            head.append(f"\nnote: {note} in {count} rows", "yellow")
        parts: list[Any] = [head]
        if self.problems:
            table = Table(title="Problems", title_justify="left", show_lines=True)
            table.add_column("kind", style="bold red")
            table.add_column("rows", justify="right")
            table.add_column("first examples", overflow="fold")
            for kind, problem in sorted(self.problems.items(), key=lambda item: -item[1].count):
                table.add_row(kind, str(problem.count), Text("\n".join(problem.examples)))
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
    """Check every row of a training file as training would; question and region rows as their readers would.

    Without a processor: shape, placeholders, images, tags, ids, empty answers. With one, also everything
    that needs tokens: length, supervised tokens, the chat template, the processor itself.

    Args:
        rows_path: JSON array or JSONL of a known schema.
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
    if not path.is_file():
        raise UserError(f"{path}: no such file. Check the path.")
    root = image_root_of(path, image_root)
    if max_length is not None and processor_or_path is None:
        raise UserError("max_length counts tokens: give the model (or its processor) as well.")
    check = _Check(Report(str(path)), root, tags, _collator(processor_or_path, root, tags), max_length)
    with row_progress(progress, f"checking {path.name}") as advance:
        try:
            for number, raw in read_raw(path):
                check.row(raw, f"{path}:{number}")
                advance()
                if limit is not None and check.report.rows >= limit:
                    break
        except UserError as error:
            check.report.add(BROKEN_FILE, "", str(error))
    check.report.images = len(check.images)
    return check.report


def _collator(processor_or_path: Any, root: Path, tags: bool) -> Any:
    if processor_or_path is None:
        return None
    from .chat import load_processor
    from .collators import VisionCollator
    from .marks import verification_marks

    is_path = isinstance(processor_or_path, str | Path)
    processor = load_processor(processor_or_path) if is_path else processor_or_path
    return VisionCollator(processor, root, marks=verification_marks(processor.tokenizer) if tags else [])


class _Check:
    """What is wrong with each row, added to the report; an image is opened once."""

    def __init__(self, report: Report, root: Path, tags: bool, collator: Any, max_length: int | None):
        self.report, self.root, self.tags = report, root, tags
        self.collator, self.max_length = collator, max_length
        self.ids: set[int] = set()
        self.images: dict[str, tuple[int, int] | RowError] = {}  # path -> size, or what is wrong with it

    def row(self, raw: dict, where: str) -> None:
        self.report.rows += 1
        try:
            kind = row_kind(raw)
            if kind == "question":
                question = question_row(raw, where)
                if question.get("answer") is None:  # its truth is something else, such as `objects`
                    self._note_all(where, self._image_problems(question["images"]))
                    if question.get("id") is not None:
                        self._note_id(question["id"], where)
                    return
            if kind == "region":
                image = raw.get("image")
                self._note_all(where, self._image_problems([image]))
                size = self.images.get(image) if isinstance(image, str) else None
                row = region_row(raw, where, size if isinstance(size, tuple) else None)
                self._note_id(row["id"], where)
                return
            row = sft_row(raw, where, self.report.notes)
        except RowError as error:
            self.report.add(error.kind, error.where, error.reason)
            return
        is_good = self._note_all(where, self._text_problems(row), self._image_problems(row["images"]))
        self._note_id(row["id"], where)
        if is_good and self.collator is not None:
            self._note_all(where, self._token_problems(row))

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

    def _text_problems(self, row: dict) -> Iterator[tuple[str, str]]:
        answers = [m for m in row["messages"] if m["role"] == "assistant"]
        if all(m.get("weight", 1) == 0 for m in answers):
            yield NO_SUPERVISION, "no assistant message, or all of them have weight 0."
        if any(not m["content"].strip() for m in answers):
            yield EMPTY_ANSWER, "an assistant message without text. Drop it or fill it in."
        try:
            typed_messages(row)
        except RowError as error:
            yield error.kind, error.reason
        if self.tags:
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
        elif tagged and self.collator is not None and not self.collator.marks:
            yield (
                TOKENS_MISSING,
                f"{OPEN} … is not one token in this model. Run `vlm-sft-rl model prepare` and use the folder it writes.",
            )

    def _token_problems(self, row: dict) -> Iterator[tuple[str, str]]:
        from .collators import check_length

        try:
            length = len(self.collator.encode(row).input_ids)
            self.report.lengths.append(length)
            check_length(length, self.max_length)
        except RowError as error:
            yield error.kind, error.reason
