"""`vlm-sft-rl demo sco`: answers in stages, then a turn that corrects them, from base weights to a report.

Test questions are only measured; nothing is chosen on them.
"""

from functools import partial
from pathlib import Path

from rich.console import Console

from ..correction.builder import build_corrections
from ..correction.config import BuildConfig
from ..correction.report import answer_view, group_table, turns_table
from ..correction.study import DRAFTED, grades_of, measure_corrections
from ..data.corrections import Draft, correction_row
from ..data.images import open_image
from ..errors import in_words
from ..evaluation.plots import lines_with_intervals
from ..evaluation.report import Example, Figure, Gallery, Section, Table, Tile, Tiles, percent
from ..evaluation.turns import by_group, by_turn, drafts, flips, quantile_groups
from ..io import read_jsonl, write_jsonl
from ..pocket.problems import CHECK, build_staged_set
from ..shapes import COUNT, Map, read_lines, read_object
from .frame import BASE, DRAWING, MEASURING, REMAKE, TRAINING, Demo, prose, shipped

RECIPE = "sco/pocket"
ROUNDS = 1000  # bootstrap
STAGED_STEPS = 240
ATTEMPT_TOKENS, TOKENS = 160, 320
BATCH = 32
# LLaVA-SCo's inference script
PUBLISHED = {"temperature": 0.7, "top_p": 0.9}
# the systems that are measured: model, correction turns, sampling, label
SYSTEMS: dict[str, tuple[str, int, dict, str]] = {
    "staged": ("staged", 0, {}, "staged model"),
    "control": ("control", 0, {}, "control: exact answers"),
    "careful": ("careful", 0, {}, "control: careful at once"),
    "repair": ("repair", 1, {}, "repair"),
    "refine": ("refine", 1, {}, "refine"),
    "repair_sampled": ("repair", 1, PUBLISHED, "repair, sampled"),
    "control_sampled": ("control", 0, PUBLISHED, "control, sampled"),
}
LABELS = {name: label for name, (*_, label) in SYSTEMS.items()}
# paired comparisons: name -> (system, turn) before and after, turns from 0
COMPARISONS = {
    "repaired answers against the control": (("control", 0), ("repair", 1)),
    "repaired answers against the careful look at once": (("careful", 0), ("repair", 1)),
    "repaired answers against the model before": (("staged", 0), ("repair", 1)),
    "first answers against the model before": (("staged", 0), ("repair", 0)),
    "sampled: repaired answers against the control": (("control_sampled", 0), ("repair_sampled", 1)),
}
HEADLINE = ("turn1", "turn2", "net_flips", "wrong_to_right", "right_to_wrong")
EXAMPLES = 4
PROBLEM = {"images": [str]} | dict.fromkeys(
    ("id", "question", "answer", "category", "staged", "checked"), str
)
DRAWN = (*DRAWING, "pocket/problems.py")
ROWS = (*DRAWN, "data")
TRAINED = (*ROWS, "pocket/base", "correction", "decoding", "graders", *TRAINING, *shipped(RECIPE))
MEASURED = (*TRAINED, *MEASURING)


class SCo(Demo):
    """A demo folder with questions about the pocket world: models that answer in stages and correct themselves."""

    def __init__(self, folder: str | Path, *, seed: int, questions: int, steps: int | None, **more):
        options = {"seed": seed, "questions": questions, "steps": steps}
        super().__init__("sco", folder, options, **more)
        self.questions, self.steps, self.problems = questions, steps, self.folder / "problems"

    def write_staged_rows(self) -> None:
        """Staged answers for the warm-up, and for the two controls: of the questions that the repair rows are about."""
        for split, name, field in (
            ("warmup", "staged", "staged"),
            ("train", "control", "staged"),
            ("train", "careful", "checked"),
        ):
            questions = self.drawn(split)
            rows = [
                correction_row(q["id"], q["images"], q["question"], [Draft(q[field], True)], CHECK)
                for q in questions
            ]
            write_jsonl(self.rows / f"{name}.jsonl", rows)

    def teach(self, system: str, start: Path, steps: int | None = None) -> None:
        overrides = {
            "model_name_or_path": start,
            "train_file": self.rows / f"{system}.jsonl",
            "image_root": self.problems,
        }
        if steps := steps or self.steps:
            overrides["max_steps"] = steps
        self.train(RECIPE, system, **overrides)

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
        questions = self.problems / "train.jsonl"
        built = build_corrections(questions, folder, config, image_root=self.problems, console=self.console)
        write_jsonl(self.rows / f"{mode}.jsonl", (row for _, row in read_jsonl(folder / "rows.jsonl")))
        self.console.print(f"  {in_words(built['counts'])}")
        if built["rejected"]:
            self.console.print(f"  left out: {in_words(built['rejected'])}")

    def measure(self, system: str) -> None:
        model, corrections, sampling, _ = SYSTEMS[system]
        settings = {"corrections": corrections, "correction_prompt": CHECK, "max_new_tokens": TOKENS}
        samples = measure_corrections(
            self.models / model,
            self.test_questions(),
            self.run_dir(system),
            {**settings, **sampling, "seed": self.seed},
            image_root=self.problems,
            batch_size=BATCH,
            console=self.console,
        )
        turns = by_turn(list(grades_of(samples, "pocket").values()), rounds=10)["turns"]
        shown = ", ".join(f"turn {t['turn']} {100 * t['after']['value']:.1f} %" for t in turns)
        self.console.print(f"  {system}: {shown}")

    def test_questions(self) -> list[dict]:
        return self.drawn("test")[: self.questions]

    def drawn(self, split: str) -> list[dict]:
        return list(read_lines(self.problems / f"{split}.jsonl", PROBLEM, REMAKE, "id"))

    def answers(self, system: str) -> list[dict]:
        return list(read_lines(self.run_dir(system) / "samples.jsonl", DRAFTED, REMAKE, "id"))


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

    Raises UserError: `output_dir` holds a demo with other settings, or a stage failed.
    """
    settings = {"seed": seed, "questions": questions, "steps": steps}
    demo = SCo(output_dir, **settings, keep_stale=keep_stale, console=console)
    demo.stage("draw the problems", lambda: build_staged_set(demo.problems, seed=seed), *DRAWN)
    demo.stage("write the staged answers", demo.write_staged_rows, *ROWS)
    taught = partial(demo.teach, "staged", BASE, steps or STAGED_STEPS)
    demo.stage("teach staged answers", taught, *TRAINED)
    demo.stage("sample attempts and build repair rows", partial(demo.build, "repair"), *TRAINED)
    demo.stage("build refine rows", partial(demo.build, "refine"), *TRAINED)
    for system in ("repair", "refine", "control", "careful"):
        # both answers of refine rows are right, so the loss is on both, as in the released code
        demo.stage(f"train {system}", partial(demo.teach, system, demo.models / "staged"), *TRAINED)
    for system in SYSTEMS:
        demo.stage(f"measure {system}", partial(demo.measure, system), *MEASURED)
    return finish(demo)


def finish(demo: SCo) -> dict:
    """All figures of the demo, from its samples, into summary.json and report.html; returns the summary."""
    summary = summarise(demo)
    figures = [[name.replace("_", " "), percent(summary[name])] for name in HEADLINE]
    gaps = [[f"{name} (points)", percent(gap["net_flips"])] for name, gap in summary["compare"].items()]
    note = f"n = {summary['n']}, seed {summary['seed']}, 95 % bootstrap intervals"
    return demo.finish(
        summary,
        Table("Repair mode, greedy", ["", "% [interval]"], [*figures, [], *gaps], note),
        "Self-correction on the pocket world",
        _sections(demo, summary),
        f"{summary['n']} test questions, seed {summary['seed']}; 95 % bootstrap intervals over questions, paired. "
        "A pocket model of 2.4 million parameters: the direction of an effect, not its size in a 7B model.",
    )


def summarise(demo: SCo) -> dict:
    test = {row["id"]: row for row in demo.test_questions()}
    answers = {system: demo.answers(system) for system in SYSTEMS}
    grades = {system: grades_of(samples, "pocket") for system, samples in answers.items()}

    def at(system: str, turn: int) -> list[tuple[str, str | None]]:
        turns = [grades[system][name] for name in test]
        return [(g.statuses[g.at(turn)], g.keys[g.at(turn)]) for g in turns]

    systems = {
        system: by_turn([grades[system][name] for name in test], ROUNDS, demo.seed)["turns"]
        for system in SYSTEMS
    }
    last = systems["repair"][-1]
    categories = {name: row["category"] for name, row in test.items()}
    sure = {sample["id"]: drafts(sample)[0]["least_sure"] for sample in answers["repair"]}
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
        "compare": {
            name: flips(at(*before), at(*after), ROUNDS, demo.seed)
            for name, (before, after) in COMPARISONS.items()
        },
        "by_category": by_group(grades["repair"], categories, 1, ROUNDS, demo.seed),
        "by_confidence": by_group(grades["repair"], quantile_groups(sure), 1, ROUNDS, demo.seed),
        "cost": {system: _cost(samples) for system, samples in answers.items()},
        "rows": {
            mode: read_object(demo.folder / f"built-{mode}" / "summary.json", {"counts": Map(COUNT)}, REMAKE)[
                "counts"
            ]
            for mode in ("repair", "refine")
        },
        "seed": demo.seed,
        "command": demo.command,
        "seconds": demo.stages.seconds,
    }


def _cost(samples: list[dict]) -> dict[str, float]:
    names = ("tokens_forwarded", "tokens_kept", "forwards", "image_encodes")
    return {name: round(sum(s["counts"][name] for s in samples) / max(1, len(samples)), 2) for name in names}


def _sections(demo: SCo, summary: dict) -> list[Section]:
    tiles = []
    for name in HEADLINE:
        value, ends = percent(summary[name]).split(" ", 1)
        tiles.append(Tile(name.replace("_", " ").replace("turn", "turn "), value, ends))
    accuracy = {
        LABELS[system]: [(turn["turn"], turn["after"]) for turn in turns]
        for system, turns in summary["systems"].items()
    }
    gaps = [
        [
            name,
            percent(gap["net_flips"]),
            f"{gap['counts']['wrong_to_right']} : {gap['counts']['right_to_wrong']}",
            f"{gap['mcnemar']:.2g}",
        ]
        for name, gap in summary["compare"].items()
    ]
    costs = [[LABELS[n], *[f"{value:g}" for value in cost.values()]] for n, cost in summary["cost"].items()]
    rows = [
        [f"{mode}: {name}", str(count)]
        for mode, counts in summary["rows"].items()
        for name, count in counts.items()
    ]
    return [
        Tiles("Repair mode, greedy (%)", tiles),
        prose("sco"),
        Figure("Accuracy by turn", partial(lines_with_intervals, accuracy, x="Turn", y="Accuracy (%)")),
        turns_table(
            "Every system (%)",
            {LABELS[system]: turns for system, turns in summary["systems"].items()},
            note="Greedy, except where it says sampled: temperature 0.7 and top-p 0.9, as published.",
        ),
        Table(
            "Differences, paired over questions (points)",
            ["", "difference", "gained : lost", "McNemar p"],
            gaps,
        ),
        group_table("By kind of problem (%)", summary["by_category"]),
        group_table(
            "By confidence of the first answer (%)",
            summary["by_confidence"],
            note="Quarters of the questions by the probability of the least sure token in the conclusion.",
        ),
        Table(
            "Cost per answer",
            ["", "tokens forwarded", "tokens kept", "forward passes", "image encodes"],
            costs,
        ),
        Table("Training rows", ["", "count"], rows, folded=True),
        *_galleries(demo),
    ]


def _galleries(demo: SCo) -> list[Section]:
    samples = demo.answers("repair")
    grades = grades_of(samples, "pocket")
    galleries = []
    for title, before, after in (
        ("Wrong, then right", False, True),
        ("Right, then wrong", True, False),
        ("Wrong both times", False, False),
    ):
        chosen = []
        for sample in samples:
            statuses = grades[sample["id"]].statuses
            if (statuses[0] == "right", statuses[-1] == "right") == (before, after):
                chosen.append((sample, statuses))
        examples = []
        for sample, statuses in chosen[:EXAMPLES]:
            image = open_image(sample["images"][0], demo.problems)
            views = [answer_view(*turn) for turn in zip(sample["trace"], statuses, strict=True)]
            note = f"Right answer: {sample['reference']['answer']}"
            examples.append(Example(image, sample["prompt"], views, note))
        if chosen:
            note = f"{len(chosen)} of {len(samples)} questions; the first {len(examples)}."
            galleries.append(Gallery(title, examples, note, legend=False))
    return galleries
