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
    kinds = sorted({kind for item in report["answer_types"].values() for kind in item["by_kind"]})
    table = Table(title="Negatives by answer type and kind", title_justify="left", box=None)
    table.add_column("answer type")
    for name in ("answers", "negatives", *kinds):
        table.add_column(name, justify="right")
    for name, item in report["answer_types"].items():
        shown = (item["answers"], item["negatives"], *(item["by_kind"].get(kind, 0) for kind in kinds))
        table.add_row(name, *map(str, shown))
    parts: list[Any] = [head, table]
    if report["not_used"]:
        rejected = Table(title="Candidates not used", title_justify="left", box=None, show_header=False)
        for reason, count in sorted(report["not_used"].items(), key=lambda item: -item[1]):
            rejected.add_row(str(count), reason)
        parts.append(rejected)
    parts += [Text(f"note: {count} {note}", "yellow") for note, count in report["notes"].items()]
    return Group(*parts)
