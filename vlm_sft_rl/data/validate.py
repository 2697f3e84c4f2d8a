"""Finding out before training what would go wrong in it."""

from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .. import errors as problems
from ..errors import RowError, UserError
from .collators import check_region
from .images import image_root_of, open_image
from .rows import check_question, is_question, is_region, question_images, read_raw, to_row, typed_messages
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
    """What `validate` found.

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

    def __rich__(self) -> Any:
        pass

        return view(self)


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

    Raises:
        UserError: the file cannot be opened, or the processor cannot be loaded. What is wrong *in* the file
            is in the report.
    """
    path = Path(rows_path)
    if not path.is_file():
        raise UserError(f"{path}: no such file. Check the path.")
    root = image_root_of(path, image_root)
    if max_length is not None and processor_or_path is None:
        raise UserError("max_length counts tokens: give the model (or its processor) as well.")
    check = _Check(Report(str(path)), root, tags, _collator(processor_or_path, root, tags), max_length)
    with _progress(progress, path.name) as advance:
        try:
            for number, raw in read_raw(path):
                check.row(raw, f"{path}:{number}")
                advance()
                if limit is not None and check.report.rows >= limit:
                    break
        except UserError as error:
            check.report.add(BROKEN_FILE, "", str(error))
    check.report.images = len(check.opened)
    return check.report


class _Check:
    def __init__(self, report: Report, root: Path, tags: bool, collator: Any, max_length: int | None):
        self.report, self.root, self.tags = report, root, tags
        self.collator, self.max_length = collator, max_length
        self.seen: set[int] = set()
        self.opened: dict[str, RowError | None] = {}
        self.sizes: dict[str, tuple[int, int]] = {}
        self.lacks_tokens = collator is not None and not collator.marks

    def row(self, raw: dict, where: str) -> None:
        report = self.report
        report.rows += 1
        try:
            if is_region(raw):
                self._region(raw, where)
                return
            if is_question(raw):
                check_question(raw, where)
                if raw.get("answer") is None:
                    self._unanswered(raw, where)
                    return
            row = to_row(raw, where, report.notes)
        except RowError as error:
            report.add(error.kind, error.where, error.reason)
            return
        found = list(self._text_problems(row)) + list(self._image_problems(row["images"]))
        for kind, reason in found:
            report.add(kind, where, reason)
        self._identity(row["id"], where)
        if self.collator is not None and not found:
            from .collators import check_length

            try:
                length = len(self.collator.encode(row).input_ids)
                report.lengths.append(length)
                check_length(length, self.max_length)
            except RowError as error:
                report.add(error.kind, where, error.reason)

    def _identity(self, identity: Any, where: str) -> None:
        if hash(identity) in self.seen:
            self.report.add(
                problems.DUPLICATE_ID, where, f"the id {identity!r} was used before. Make ids unique."
            )
        self.seen.add(hash(identity))

    def _region(self, raw: dict, where: str) -> None:
        for kind, reason in list(self._image_problems([raw.get("image")])):
            self.report.add(kind, where, reason)
        check_region(raw, where, self.sizes.get(raw.get("image")))
        self._identity(raw["id"], where)

    def _unanswered(self, raw: dict, where: str) -> None:
        """A question whose ground truth is something else than an answer, such as `objects`."""
        for kind, reason in self._image_problems(question_images(raw)):
            self.report.add(kind, where, reason)
        if raw.get("id") is not None:
            self._identity(raw["id"], where)

    def _text_problems(self, row: dict) -> Iterator[tuple[str, str]]:
        answers = [m for m in row["messages"] if m["role"] == "assistant"]
        if all(m.get("weight", 1) == 0 for m in answers):
            yield problems.NO_SUPERVISION, "no assistant message, or all of them have weight 0."
        if any(not m["content"].strip() for m in answers):
            yield problems.EMPTY_ANSWER, "an assistant message without text. Drop it or fill it in."
        try:
            typed_messages(row)
        except RowError as error:
            yield error.kind, error.reason
        if self.tags:
            yield from self._tag_problems(answers)

    def _tag_problems(self, answers: list[dict]) -> Iterator[tuple[str, str]]:
        counts, bad, tagged = self.report.tags, None, False
        for message in answers:
            counts["answers"] += 1
            try:
                phrases = spans(message["content"])
            except TagError as error:
                bad = bad or str(error)
                continue
            counts["tagged answers"] += bool(phrases)
            counts["confident"] += sum(p.confident for p in phrases)
            counts["unconfident"] += sum(not p.confident for p in phrases)
            tagged = tagged or bool(phrases)
        if bad:
            yield problems.TAGS, bad
        elif tagged and self.lacks_tokens:
            yield (
                TOKENS_MISSING,
                (
                    f"{OPEN} … is not one token in this model. Run `vlm-sft-rl model prepare` and use the "
                    "folder it writes."
                ),
            )

    def _image_problems(self, images: list) -> Iterator[tuple[str, str]]:
        for image in images:
            key = image if isinstance(image, str) else None
            if key is None or key not in self.opened:
                error = self._open(image)
                if key is not None:
                    self.opened[key] = error
            else:
                error = self.opened[key]
            if error is not None:
                yield error.kind, error.reason
                return

    def _open(self, image: Any) -> RowError | None:
        try:
            size = open_image(image, self.root).size
        except RowError as error:
            return error
        if isinstance(image, str):
            self.sizes[image] = size
        return None


def _collator(processor_or_path: Any, root: Path, tags: bool) -> Any:
    if processor_or_path is None:
        return None
    from .chat import load_processor
    from .collators import VisionCollator
    from .marks import verification_marks

    is_path = isinstance(processor_or_path, str | Path)
    processor = load_processor(processor_or_path) if is_path else processor_or_path
    return VisionCollator(processor, root, marks=verification_marks(processor.tokenizer) if tags else [])


@contextmanager
def _progress(show: bool, name: str):
    if not show:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = [TextColumn("checking {task.description}"), BarColumn(), TextColumn("{task.completed} rows")]
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda: bar.advance(task)


# The terminal view of a validation report.
def view(report: Report) -> Group:
    """Problems with their first examples, token lengths and tag balance, as a rich renderable."""
    return Group(
        *(part for part in (_head(report), _problems(report), _lengths(report), _tags(report)) if part)
    )


def _head(report: Report) -> Text:
    verdict = Text("OK", "bold green") if report.ok else Text("NOT READY", "bold red")
    text = Text(f"{report.path}: {report.rows} rows, {report.images} images  ") + verdict
    if not report.rows:
        text.append("\nThe file has no rows.", "red")
    for note, count in report.notes.items():
        text.append(f"\nnote: {note} in {count} rows", "yellow")
    return text


def _problems(report: Report) -> Table | None:
    if not report.problems:
        return None
    table = Table(title="Problems", title_justify="left", show_lines=True)
    table.add_column("kind", style="bold red")
    table.add_column("rows", justify="right")
    table.add_column("first examples", overflow="fold")
    for kind, problem in sorted(report.problems.items(), key=lambda item: -item[1].count):
        table.add_row(kind, str(problem.count), Text("\n".join(problem.examples)))
    return table


def _lengths(report: Report) -> Table | None:
    buckets = report.histogram()
    if not buckets:
        return None
    table = Table(title="Tokens per row, images included", title_justify="left", box=None, show_header=False)
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column(style="cyan")
    most = max(count for *_, count in buckets)
    for low, high, count in buckets:
        table.add_row(f"{low}-{high}", str(count), "█" * -(-40 * count // most))
    return table


def _tags(report: Report) -> Text | None:
    counts = report.tags
    total = counts["confident"] + counts["unconfident"]
    if not total:
        return None
    return Text(
        f"Tags: {counts['confident']} confident and {counts['unconfident']} unconfident phrases "
        f"({100 * counts['unconfident'] / total:.1f} % unconfident) in {counts['tagged answers']} of "
        f"{counts['answers']} answers"
    )
