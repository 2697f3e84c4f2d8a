"""The terminal view of a validation report."""

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .validate import Report


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
