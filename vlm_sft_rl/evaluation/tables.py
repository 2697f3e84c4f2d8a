"""Tables on the terminal."""

from collections.abc import Collection, Sequence

from rich.markup import escape
from rich.table import Table


def interval_text(interval: dict, digits: int = 3) -> str:
    return f"{interval['value']:.{digits}f} [{interval['low']:.{digits}f}, {interval['high']:.{digits}f}]"


def summary_table(summary: dict, lower_is_better: Collection[str] = ()) -> Table:
    """Metrics with intervals, and the cost."""
    tau = f", tau {summary['threshold']:g}" if summary["threshold"] is not None else ""
    units = "" if summary["units"] == summary["n"] else f" in {summary['units']} groups"
    table = Table(
        title=escape(f"{summary['spec']}: {summary['model']} ({summary['decoder']}{tau})"),
        caption=f"n = {summary['n']}{units}, {summary['config']['level']:.0%} bootstrap intervals over questions "
        f"({summary['config']['rounds']} rounds, seed {summary['seed']})",
    )
    table.add_column("")
    table.add_column(escape("value [interval]"), justify="right")
    for name, interval in summary["metrics"].items():
        arrow = " (lower is better)" if name in lower_is_better else ""
        table.add_row(name + arrow, interval_text(interval))
    verifier = summary.get("verifier")
    table.add_section()
    if verifier and verifier["auc"] and verifier["auc"]["low"] is not None:
        table.add_row("ROC area of P(</UN>), own phrases", interval_text(verifier["auc"]))
    if summary["n_not_ok"]:
        table.add_row("answers not fully verified", f"{summary['n_not_ok']} of {summary['n']}")
    for name, value in summary["cost"].items():
        table.add_row(name.replace("_", " "), f"{value:.2f}")
    if judge := summary.get("judge"):
        usage = judge["usage"]
        asked = f"{usage['answered']} asked, {usage['cached']} kept, {usage['failed']} failed"
        table.add_row(escape(f"verdicts of {judge['model']}"), asked)
        table.add_row("cost of the judge", f"{usage['cost']:.4g}")
    return table


def published_table(summary: dict) -> Table | None:
    """Figures of others as published, below ours; None where the spec quotes none."""
    rows = [row for row in summary["published"] if set(row["values"]) & set(summary["metrics"])]
    if not rows:
        return None
    names = [name for name in summary["metrics"] if any(name in row["values"] for row in rows)]
    table = Table(title="As published (quoted, not measured here)")
    table.add_column("system")
    for name in names:
        table.add_column(name, justify="right")
    table.add_row("this run", *(f"{summary['metrics'][name]['value']:.4g}" for name in names), style="bold")
    for row in rows:
        quoted = [f"{row['values'][name]:.4g}" if name in row["values"] else "" for name in names]
        table.add_row(escape(row["system"]), *quoted)
    return table


def quoted_from(rows: Sequence[dict]) -> str:
    """Where published figures come from: each source once, with its systems where there are several."""
    systems: dict[str, list[str]] = {}
    for row in rows:
        systems.setdefault(row["source"], []).append(row["system"])
    said = [
        f"{source} ({'; '.join(names)})" if len(systems) > 1 else source for source, names in systems.items()
    ]
    return f"Quoted, not measured here: {', '.join(said)}."


def published_by_category(summary: dict) -> tuple[str, list[str], list[list[str]]] | None:
    """Metric, categories and rows (system, figure by category, this run first) of figures that are quoted by category.

    None where the spec quotes none, or none of categories that were measured.
    """
    measured = summary.get("by_category", {})
    quoted = [row for row in summary["published"] if set(row.get("by_category", {})) & set(measured)]
    names = [
        name
        for name in summary["metrics"]
        if any(name in values for row in quoted for values in row["by_category"].values())
    ]
    if not names:
        return None
    metric = names[0]
    shown = [category for category in measured if any(category in row["by_category"] for row in quoted)]
    rows = [["this run", *(f"{measured[category][metric]['value']:.4g}" for category in shown)]]
    for row in quoted:
        figures = [row["by_category"].get(category, {}).get(metric) for category in shown]
        rows.append([row["system"], *("" if figure is None else f"{figure:.4g}" for figure in figures)])
    return metric, shown, rows


def published_category_table(summary: dict) -> Table | None:
    """Figures of others by category, below ours; None where the spec quotes none."""
    if (found := published_by_category(summary)) is None:
        return None
    metric, categories, rows = found
    table = Table(title=escape(f"{metric} by category, as published (quoted, not measured here)"))
    for heading in ("system", *categories):
        table.add_column(escape(heading), justify="left" if heading == "system" else "right")
    for number, row in enumerate(rows):
        table.add_row(*map(escape, row), style=None if number else "bold")
    return table


def comparison_table(comparison: dict) -> Table:
    """The outcome of `compare.compare`."""
    table = Table(
        title=escape(f"{comparison['spec']}: A = {comparison['a']}, B = {comparison['b']}"),
        caption=f"paired bootstrap over {comparison['n']} shared questions ({comparison['rounds']} rounds, "
        f"{comparison['level']:.0%} intervals, seed {comparison['seed']}); * = the interval excludes 0",
    )
    for heading in ("metric", "A", "B", "A - B [interval]", ""):
        table.add_column(escape(heading), justify="left" if heading == "metric" else "right")
    for name, row in comparison["metrics"].items():
        star = "*" if row["excludes_zero"] else ""
        table.add_row(name, f"{row['a']:.3f}", f"{row['b']:.3f}", interval_text(row["difference"]), star)
    return table
