"""The report of `demo sco`: what the correction turn did, for whom, and beside what."""

from typing import TYPE_CHECKING

from ..correction.report import answer_view, group_table, percent, turns_table
from ..data.images import open_image
from ..evaluation import plots, report

if TYPE_CHECKING:
    from .demo_sco import Demo

EXAMPLES = 4
LABELS = {
    "staged": "staged model",
    "control": "control: exact answers",
    "careful": "control: careful at once",
    "repair": "repair",
    "refine": "refine",
    "repair_sampled": "repair, sampled",
    "control_sampled": "control, sampled",
}
SAMPLED = "Greedy, except where it says sampled: temperature 0.7 and top-p 0.9, as published."


TILES = ("turn1", "turn2", "net flips", "wrong to right", "right to wrong")


def _tile(name: str, interval: dict) -> report.Tile:
    value, low, high = (100 * interval[key] for key in ("value", "low", "high"))
    return report.Tile(name.replace("turn", "turn "), f"{value:.1f}", f"[{low:.1f}, {high:.1f}]")


def write_report(demo: "Demo", summary: dict) -> None:
    tiles = [_tile(name, summary[name.replace(" ", "_")]) for name in TILES]
    accuracy = {
        LABELS[name]: [(turn["turn"], turn["after"]) for turn in turns]
        for name, turns in summary["systems"].items()
    }
    sections: list[report.Section] = [
        report.Tiles("Repair mode, greedy (%)", tiles),
        report.Text(
            "What was done",
            "The pocket VLM learned to answer in four stages. It then answered new training questions at temperature 1, the "
            "answers were graded by the exact truth, and a second turn was taught that looks each choice up and "
            "answers from what it saw: wrong attempts become right, the conclusion of right ones stays. Wrong attempts are "
            "read, never taught. Test questions share no picture with training.\n\n"
            "Both controls took as many further steps on the same questions without a correction turn: one on answers of "
            "the first form, one on careful answers at once. What repair gains over the second control is due to seeing the "
            "first answer; the rest is due to the closer look. Refine mode is the published pipeline: both answers are "
            "right, and the loss is on both.",
        ),
        report.Figure(
            "Accuracy by turn",
            lambda dark: plots.lines_with_intervals(accuracy, x="Turn", y="Accuracy (%)", dark=dark),
        ),
        turns_table("Every system (%)", {LABELS[n]: t for n, t in summary["systems"].items()}, note=SAMPLED),
        report.Table(
            "Differences, paired over questions (points)",
            ["", "difference", "gained : lost", "McNemar p"],
            [
                [
                    name,
                    percent(found["net_flips"]),
                    f"{found['counts']['wrong_to_right']} : {found['counts']['right_to_wrong']}",
                    f"{found['mcnemar']:.2g}",
                ]
                for name, found in summary["compare"].items()
            ],
        ),
        group_table("By kind of problem (%)", summary["by_category"]),
        group_table(
            "By confidence of the first answer (%)",
            summary["by_confidence"],
            note="Quarters of the questions by the probability of the least sure token in the conclusion.",
        ),
        report.Table(
            "Cost per answer",
            ["", "tokens forwarded", "tokens kept", "forward passes", "image encodes"],
            [[LABELS[n], *[f"{v:g}" for v in cost.values()]] for n, cost in summary["cost"].items()],
        ),
        report.Table(
            "Training rows",
            ["", "count"],
            [
                [f"{mode}: {name}", str(n)]
                for mode, counts in summary["rows"].items()
                for name, n in counts.items()
            ],
            folded=True,
        ),
        *_galleries(demo),
    ]
    report.render_report(
        "Self-correction on the pocket world",
        sections,
        demo.folder / "report.html",
        subtitle=f"{summary['n']} test questions, seed {summary['seed']}; 95 % bootstrap intervals over questions, paired. "
        "A pocket model of 2.4 million parameters: the direction of an effect, not its size in a 7B model.",
        footer=report.Footer(demo.command),
    )


def _galleries(demo: "Demo") -> list[report.Section]:
    from ..correction.measure import grades_of

    samples = demo.samples("repair")
    grades = grades_of(samples, "pocket")
    found = []
    for title, before, after in (
        ("Wrong, then right", False, True),
        ("Right, then wrong", True, False),
        ("Wrong both times", False, False),
    ):
        chosen = [
            s
            for s in samples
            if (grades[s["id"]].statuses[0] == "right") == before
            and (grades[s["id"]].statuses[-1] == "right") == after
        ]
        if chosen:
            views = [
                report.Example(
                    open_image(s["images"][0], demo.problems),
                    s["prompt"],
                    [
                        answer_view(turn, status)
                        for turn, status in zip(s["trace"], grades[s["id"]].statuses, strict=True)
                    ],
                    note=f"Right answer: {s['reference']['answer']}",
                )
                for s in chosen[:EXAMPLES]
            ]
            note = f"{len(chosen)} of {len(samples)} questions; the first {len(views)}."
            found.append(report.Gallery(title, views, note=note, legend=False))
    return found
