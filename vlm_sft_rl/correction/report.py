"""Tables and views that the reports on correction share."""

from collections.abc import Mapping, Sequence

from ..evaluation import report
from ..evaluation.report import percent


def flip_cells(found: Mapping) -> list[str]:
    """The cells of one comparison, in the order of `FLIP_COLUMNS`."""
    names = ("after", "net_flips", "wrong_to_right", "right_to_wrong", "agreement", "unreadable_after")
    return [*[percent(found[name]) for name in names], f"{found['mcnemar']:.2g}"]


FLIP_COLUMNS = [
    "accuracy",
    "net flips",
    "wrong to right",
    "right to wrong",
    "same answer",
    "unreadable",
    "McNemar p",
]


def turns_table(title: str, systems: Mapping[str, Sequence[Mapping]], note: str = "") -> report.Table:
    """Every turn of every system, against its first turn."""
    rows = []
    for name, turns in systems.items():
        for turn in turns:
            first = turn["turn"] == 1
            cells = flip_cells(turn)
            if first:
                cells = [cells[0], "", "", "", "", cells[5], ""]
            rows.append([name.replace(" ", "\u00a0") if first else "", str(turn["turn"]), *cells])
    return report.Table(title, ["system", "turn", *FLIP_COLUMNS], rows, note=note)


def group_table(title: str, groups: Mapping[str, Mapping], note: str = "") -> report.Table:
    """Flips by group of questions."""
    names = ("before", "after", "net_flips", "wrong_to_right", "right_to_wrong")
    rows = [
        # a name that breaks at every blank makes a column of one word a line
        [name.replace(" ", "\u00a0"), str(g["n"]), *[percent(g[key]) for key in names], f"{g['mcnemar']:.2g}"]
        for name, g in groups.items()
    ]
    columns = ["", "n", "before", "after", "net flips", "wrong to right", "right to wrong", "McNemar p"]
    return report.Table(title, columns, rows, note=note)


def answer_view(turn: Mapping, status: str) -> report.AnswerView:
    """A draft as an answer of a gallery."""
    truth = None if status == "unreadable" else status == "right"
    sure = f"{turn['least_sure']:.2f}" if turn.get("least_sure") is not None else ""
    note = f"{status}" + (f", least sure token {sure}" if sure else "")
    text = " ".join(turn["text"].split()) or "(nothing)"
    return report.AnswerView(f"turn {turn['number']}", [report.Piece(text, truth=truth)], note=note)
