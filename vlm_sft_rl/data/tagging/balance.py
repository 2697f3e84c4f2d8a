"""The balance of a tagged set, as JSON and as a table: what the verifier will have seen."""

from typing import Any

from .build import Counts


def to_json(counts: Counts) -> dict:
    """Counts by answer type and kind, and the share of unconfident phrases."""
    tagged = counts.phrases["confident"] + counts.phrases["unconfident"]
    by_type: dict[str, dict] = {}
    for kind, number in sorted(counts.answers.items()):
        wrong = {k: n for (a, k), n in sorted(counts.negatives.items()) if a == kind}
        by_type[kind] = {"answers": number, "negatives": sum(wrong.values()), "by_kind": wrong}
    return {
        "rows": dict(counts.rows),
        "phrases": dict(counts.phrases),
        "unconfident_share": counts.phrases["unconfident"] / tagged if tagged else 0.0,
        "answer_types": by_type,
        "not_used": {f"{kind}: {reason}": n for (kind, reason), n in sorted(counts.faults.items())},
        "notes": {note: n for note, n in sorted(counts.notes.items()) if n},
    }


def view(report: dict) -> Any:
    """A rich renderable of `to_json`'s result."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rows, phrases = report["rows"], report["phrases"]
    head = Text(
        f"{rows.get('positive', 0)} positive and {rows.get('negative', 0)} negative rows; {phrases.get('confident', 0)} "
        f"confident phrases in positives, {phrases.get('unconfident', 0)} unconfident "
        f"({100 * report['unconfident_share']:.1f} % of both)"
    )
    table = Table(title="Negatives by answer type", title_justify="left", box=None, pad_edge=False)
    for name, justify in (
        ("answer type", "left"),
        ("answers", "right"),
        ("negatives", "right"),
        ("of these", "left"),
    ):
        table.add_column(name, justify=justify, overflow="fold")
    for name, item in report["answer_types"].items():
        kinds = sorted(item["by_kind"].items(), key=lambda kind: -kind[1])
        shown = ", ".join(f"{count} {kind}" for kind, count in kinds)
        table.add_row(name, str(item["answers"]), str(item["negatives"]), shown)
    parts: list[Any] = [head, table]
    if report["not_used"]:
        rejected = Table(title="Candidates not used", title_justify="left", box=None, show_header=False)
        for reason, count in sorted(report["not_used"].items(), key=lambda item: -item[1]):
            rejected.add_row(str(count), reason)
        parts.append(rejected)
    parts += [Text(f"note: {count} {note}", "yellow") for note, count in report["notes"].items()]
    return Group(*parts)
