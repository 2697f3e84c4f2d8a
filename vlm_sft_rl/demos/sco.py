"""`vlm-sft-rl demo sco`: answers in stages, then a turn that corrects them, from base weights to a report.

Every stage writes its result and is left out when it is there, so that an interrupted demo goes on where it was. Test
questions are only measured; nothing is chosen on them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ..correction.builder import build_corrections
from ..correction.config import BuildConfig
from ..correction.report import answer_view, group_table, percent, turns_table
from ..correction.study import grades_of, measure_corrections
from ..data.corrections import Draft, correction_row
from ..data.images import open_image
from ..errors import UserError
from ..evaluation import plots, report
from ..evaluation.turns import by_group, by_turn, flips, quantile_groups
from ..io import read_json, read_jsonl, write_json, write_jsonl
from ..launch import launch_training
from ..pocket.problems import CHECK, build_staged_set
from ..runs import Stages, versions

BASE = Path(__file__).parents[1] / "pocket" / "base"
ROUNDS = 1000  # bootstrap
STAGED_STEPS = 240
ATTEMPT_TOKENS, TOKENS = 160, 320
BATCH = 32
# LLaVA-SCo's inference script
PUBLISHED = {"temperature": 0.7, "top_p": 0.9}
# the systems that are measured: model, correction turns, sampling
SYSTEMS: dict[str, tuple[str, int, dict]] = {
    "staged": ("staged", 0, {}),
    "control": ("control", 0, {}),
    "careful": ("careful", 0, {}),
    "repair": ("repair", 1, {}),
    "refine": ("refine", 1, {}),
    "repair_sampled": ("repair", 1, PUBLISHED),
    "control_sampled": ("control", 0, PUBLISHED),
}


# parts of the package that the stages' results depend on
DRAWING = ("pocket/problems.py", "pocket/language.py", "pocket/render.py", "pocket/world.py")
ROWS = ("data/corrections.py", "data/stages.py")
TRAINING = (*ROWS, "data/collators.py", "data/marks.py", "trainers/self_correction_sft.py", "methods/sco.py")
BUILDING = (
    *ROWS,
    "correction/attempts.py",
    "correction/config.py",
    "correction/builder.py",
    "graders",
    "decoding",
)
MEASURING = (*ROWS, "correction/study.py", "graders", "decoding")


class Demo:
    """One demo folder: its stages and what was measured."""

    def __init__(
        self, folder: Path, seed: int, questions: int, steps: int | None, keep_stale: bool, console: Console
    ):
        self.folder, self.seed, self.questions, self.steps = folder, seed, questions, steps
        self.console = console
        self.problems, self.rows, self.models = folder / "problems", folder / "rows", folder / "models"
        self.command = f"vlm-sft-rl demo sco --output-dir {folder} --seed {seed} --questions {questions}"
        self.command += f" --steps {steps}" if steps else ""
        settings = {"seed": seed, "questions": questions, "steps": steps}
        path = folder / "demo.json"
        if path.exists() and read_json(path) != settings:
            raise UserError(
                f"{path}: this folder holds a demo with other settings ({json.dumps(read_json(path))}). Choose another "
                "--output-dir or delete the folder."
            )
        write_json(path, settings)
        self.stages = Stages(folder, console, keep_stale=keep_stale)

    @property
    def seconds(self) -> dict[str, float]:
        return self.stages.seconds

    def stage(self, name: str, action: Callable[[], object], *uses: str) -> None:
        """Run `action` unless it was finished before by the code that is here now."""
        self.stages.run(name, action, ["demos/sco.py", *uses])

    def train(self, system: str, start: Path, **changes) -> None:
        """Train in a process of its own through `accelerate launch`, as a user would."""
        overrides = {
            "model_name_or_path": start,
            "train_file": self.rows / f"{system}.jsonl",
            "image_root": self.problems,
            "output_dir": self.models / system,
            "seed": self.seed,
            **({"max_steps": self.steps} if self.steps else {}),
            **changes,
        }
        words = [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
        if status := launch_training("sco/pocket", words, "cpu"):
            raise UserError(f"training {system} failed with status {status}; the message is above.")

    def build(self, mode: str) -> None:
        """Correction rows of a mode; the teacher is the exact ground truth."""
        folder = self.folder / f"built-{mode}"
        config = BuildConfig(
            mode=mode,
            teacher="gold",
            model=str(self.models / "staged") if mode == "repair" else None,
            grader="pocket",
            gold_field="checked",
            samples=2,
            temperature=1.0,
            max_new_tokens=ATTEMPT_TOKENS,
            keep="teacher",
            per_question=2,
            prompt=CHECK,
            batch_size=2 * BATCH,
            seed=self.seed,
        )
        summary = build_corrections(
            self.problems / "train.jsonl",
            folder,
            config,
            image_root=self.problems,
            console=self.console,
        )
        write_jsonl(self.rows / f"{mode}.jsonl", (row for _, row in read_jsonl(folder / "rows.jsonl")))
        self.console.print(summary["counts"], summary["rejected"])

    def run_dir(self, system: str) -> Path:
        return self.folder / "eval" / system

    def measure(self, system: str) -> None:
        model, corrections, sampling = SYSTEMS[system]
        settings = {
            "corrections": corrections,
            "correction_prompt": CHECK,
            "max_new_tokens": TOKENS,
            "seed": self.seed,
            **sampling,
        }
        samples = measure_corrections(
            self.models / model,
            self.test_questions(),
            self.run_dir(system),
            settings,
            image_root=self.problems,
            batch_size=BATCH,
            console=self.console,
        )
        turns = by_turn(list(grades_of(samples, "pocket").values()), rounds=10)["turns"]
        shown = ", ".join(f"turn {t['turn']} {100 * t['after']['value']:.1f} %" for t in turns)
        self.console.print(f"  {system}: {shown}")

    def test_questions(self) -> list[dict]:
        return [row for _, row in read_jsonl(self.problems / "test.jsonl")][: self.questions]

    def samples(self, system: str) -> list[dict]:
        return [row for _, row in read_jsonl(self.run_dir(system) / "samples.jsonl")]


def run(
    output_dir: str | Path,
    *,
    seed: int = 0,
    questions: int = 1500,
    steps: int | None = None,
    keep_stale: bool = False,
    console: Console | None = None,
) -> dict:
    """Run or resume the demo and return its summary.

    Raises:
        UserError: `output_dir` holds a demo with other settings, or a stage failed.
    """
    from transformers.utils import logging

    pass

    logging.disable_progress_bar()  # a bar for every loading of a small model hides the demo's own progress
    console = console or Console()
    demo = Demo(Path(output_dir), seed, questions, steps, keep_stale, console)
    demo.stage("draw the problems", lambda: build_staged_set(demo.problems, seed=seed), *DRAWING)
    demo.stage("write the staged answers", lambda: _staged_rows(demo), *ROWS)
    taught = steps or STAGED_STEPS
    demo.stage(
        "teach staged answers", lambda: demo.train("staged", BASE, max_steps=taught), *TRAINING, "pocket/base"
    )
    demo.stage("sample attempts and build repair rows", lambda: demo.build("repair"), *BUILDING)
    demo.stage("build refine rows", lambda: demo.build("refine"), *BUILDING)
    for system in ("repair", "refine", "control", "careful"):
        # both answers of refine rows are right, so the loss is on both, as in the released code
        demo.stage(f"train {system}", lambda s=system: demo.train(s, demo.models / "staged"), *TRAINING)
    for system in SYSTEMS:
        demo.stage(f"measure {system}", lambda s=system: demo.measure(s), *MEASURING)
    summary = summarise(demo)
    write_json(demo.folder / "summary.json", summary)
    write_report(demo, summary)
    _print(demo, summary)
    return summary


def _staged_rows(demo: Demo) -> None:
    """Staged answers for the warm-up, and for the two controls: of the questions that the repair rows are about."""
    for split, name, field in (
        ("warmup", "staged", "staged"),
        ("train", "control", "staged"),
        ("train", "careful", "checked"),
    ):
        rows = [row for _, row in read_jsonl(demo.problems / f"{split}.jsonl")]
        drafts = ((row, [Draft(row[field], True)]) for row in rows)
        write_jsonl(
            demo.rows / f"{name}.jsonl",
            (correction_row(row["id"], row["images"], row["question"], d, CHECK) for row, d in drafts),
        )


def summarise(demo: Demo) -> dict:
    """All figures of the demo, from its samples."""
    test = {row["id"]: row for row in demo.test_questions()}
    grades = {system: grades_of(demo.samples(system), "pocket") for system in SYSTEMS}
    order = list(test)

    def at(system: str, turn: int) -> list[tuple[str, str | None]]:
        found = [grades[system][i] for i in order]
        return [(g.statuses[g.at(turn)], g.keys[g.at(turn)]) for g in found]

    systems = {s: by_turn([grades[s][i] for i in order], ROUNDS, demo.seed)["turns"] for s in SYSTEMS}
    last = systems["repair"][-1]
    sure = {
        row["id"]: next(t["least_sure"] for t in row["trace"] if t["kind"] == "turn")
        for row in demo.samples("repair")
    }
    compare = {
        "repaired answers against the control": flips(at("control", 0), at("repair", 1), ROUNDS, demo.seed),
        "repaired answers against the careful look at once": flips(
            at("careful", 0), at("repair", 1), ROUNDS, demo.seed
        ),
        "repaired answers against the model before": flips(
            at("staged", 0), at("repair", 1), ROUNDS, demo.seed
        ),
        "first answers against the model before": flips(at("staged", 0), at("repair", 0), ROUNDS, demo.seed),
    }
    if "control_sampled" in grades:
        compare["sampled: repaired answers against the control"] = flips(
            at("control_sampled", 0), at("repair_sampled", 1), ROUNDS, demo.seed
        )
    return {
        "method": "sco",
        "mode": "repair",
        "turn1": last["before"],
        "turn2": last["after"],
        "net_flips": last["net_flips"],
        "wrong_to_right": last["wrong_to_right"],
        "right_to_wrong": last["right_to_wrong"],
        "mcnemar": last["mcnemar"],
        "n": last["n"],
        "systems": systems,
        "compare": compare,
        "by_category": by_group(
            grades["repair"], {i: test[i]["category"] for i in order}, 1, ROUNDS, demo.seed
        ),
        "by_confidence": by_group(grades["repair"], quantile_groups(sure), 1, ROUNDS, demo.seed),
        "cost": {system: _cost(demo.samples(system)) for system in SYSTEMS},
        "rows": {
            mode: read_json(demo.folder / f"built-{mode}" / "summary.json")["counts"]
            for mode in ("repair", "refine")
        },
        "seed": demo.seed,
        "command": demo.command,
        "seconds": demo.seconds,
        "versions": versions(),
    }


def _cost(samples: list[dict]) -> dict[str, float]:
    n = max(1, len(samples))
    names = ("tokens_forwarded", "tokens_kept", "forwards", "image_encodes")
    return {name: round(sum(s["counts"][name] for s in samples) / n, 2) for name in names}


def _print(demo: Demo, summary: dict) -> None:
    def text(value: dict) -> str:
        return f"{100 * value['value']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"

    console = demo.console
    console.rule("[bold]repair mode, greedy", align="left")
    for name in ("turn1", "turn2", "net_flips", "wrong_to_right", "right_to_wrong"):
        console.print(f"  {name}: {text(summary[name])} %", highlight=False, markup=False)
    for name, found in summary["compare"].items():
        console.print(f"  {name}: {text(found['net_flips'])} points", highlight=False, markup=False)
    console.print(f"  n = {summary['n']}. Report: {demo.folder / 'report.html'}", highlight=False)


# The report of `demo sco`: what the correction turn did, for whom, and beside what.
if TYPE_CHECKING:
    pass

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
        command=demo.command,
    )


def _galleries(demo: "Demo") -> list[report.Section]:
    from ..correction.study import grades_of

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
