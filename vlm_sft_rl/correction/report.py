"""Tables and views that the reports on correction share."""

from collections.abc import Mapping, Sequence

from ..evaluation.report import AnswerView, Piece, Table, percent

FLIP_COLUMNS = {
    "after": "accuracy",
    "net_flips": "net flips",
    "wrong_to_right": "wrong to right",
    "right_to_wrong": "right to wrong",
    "agreement": "same answer",
    "unreadable_after": "unreadable",
}


def turns_table(title: str, systems: Mapping[str, Sequence[Mapping]], note: str = "") -> Table:
    """Every turn of every system, against its first turn."""
    rows = []
    for name, turns in systems.items():
        for turn in turns:
            first = turn["turn"] == 1
            # a first turn has nothing before it
            shown = ("after", "unreadable_after") if first else tuple(FLIP_COLUMNS)
            cells = [percent(turn[key]) if key in shown else "" for key in FLIP_COLUMNS]
            label = name.replace(" ", "\u00a0") if first else ""
            rows.append([label, str(turn["turn"]), *cells, "" if first else f"{turn['mcnemar']:.2g}"])
    return Table(title, ["system", "turn", *FLIP_COLUMNS.values(), "McNemar p"], rows, note)


def group_table(title: str, groups: Mapping[str, Mapping], note: str = "") -> Table:
    """Flips by group of questions."""
    names = ("before", "after", "net_flips", "wrong_to_right", "right_to_wrong")
    rows = [
        # a name that breaks at every blank makes a column of one word a line
        [name.replace(" ", "\u00a0"), str(g["n"]), *[percent(g[key]) for key in names], f"{g['mcnemar']:.2g}"]
        for name, g in groups.items()
    ]
    columns = ["", "n", *(name.replace("_", " ") for name in names), "McNemar p"]
    return Table(title, columns, rows, note)


def answer_view(turn: Mapping, status: str) -> AnswerView:
    """A draft as an answer of a gallery."""
    truth = None if status == "unreadable" else status == "right"
    sure = f", least sure token {turn['least_sure']:.2f}" if turn.get("least_sure") is not None else ""
    text = " ".join(turn["text"].split()) or "(nothing)"
    return AnswerView(f"turn {turn['number']}", [Piece(text, truth=truth)], status + sure)
