"""Wrong attempts joined with right ones of the same group (Octopus, arXiv 2602.08503): does it pay to learn from them?

    python eval/beyond/recombined.py OUT DEMO…

Every DEMO is a folder in which `vlm-sft-rl demo sco` has taught the staged answers, one a seed. Its model answers each
training question four times, as a group of GRPO would; a group with right and wrong answers is mixed. From the same rows
two systems are trained with the same compute (6 FLOPs a parameter for a token trained on):

    answers      right answers of mixed groups alone
    recombined   the same answers behind an attempt of their group, wrong in half of the rows, which is read and never taught

Measured on the test questions, all seeds together, greedy: after the first answer, and `recombined` after its correction.
Finished parts are left out when the command is given again. Writes `OUT/recombined.json` and prints it as a table.
"""

from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table
from studies import ROUNDS, command, fit

from vlm_sft_rl.correction.builder import build_corrections
from vlm_sft_rl.correction.config import BuildConfig
from vlm_sft_rl.correction.cost import training_cost
from vlm_sft_rl.correction.study import grades_of, measure_corrections
from vlm_sft_rl.evaluation.turns import TurnGrades, flips
from vlm_sft_rl.graders import load_grader
from vlm_sft_rl.graders.grade import grade_staged
from vlm_sft_rl.io import read_json, read_jsonl, write_json
from vlm_sft_rl.pocket.problems import CHECK

GROUP, STEPS = 4, 320
# correction turns, in training and when the test questions are asked
TURNS = {"answers": 0, "recombined": 1}
# of the table: the system and the turn (from 0) after which its answers count
SHOWN = {
    "staged": ("staged", 0),
    "answers": ("answers", 0),
    "recombined, first answer": ("recombined", 0),
    "recombined, corrected": ("recombined", 1),
}
BASE = "answers"


def build(demo: Path, folder: Path, seed: int) -> None:
    """Rows whose correction is another answer of the group; an attempt that is right is followed by itself."""
    config = BuildConfig(
        teacher="own",
        model=str(demo / "models/staged"),
        grader="pocket",
        samples=GROUP,
        temperature=1.0,
        top_p=None,
        max_new_tokens=160,
        per_question=2,
        prompt=CHECK,
        batch_size=64,
        seed=seed,
    )
    if not (folder / "summary.json").is_file():
        questions = demo / "problems/train.jsonl"
        build_corrections(
            questions, folder, config, image_root=demo / "problems", console=Console(quiet=True)
        )


def mixed_share(demo: Path, folder: Path) -> dict[str, int]:
    """How many groups are all right, mixed, and without a right answer."""
    questions = {row["id"]: row for _, row in read_jsonl(demo / "problems/train.jsonl")}
    grader, right = load_grader("pocket"), Counter(dict.fromkeys(questions, 0))
    for path in sorted((folder / "attempts").glob("samples*.jsonl")):
        for _, line in read_jsonl(path):
            status = grade_staged(grader, line["answer"], questions[line["question_id"]]).status
            right[line["question_id"]] += status == "right"
    kinds = Counter("all right" if n == GROUP else "mixed" if n else "none right" for n in right.values())
    return dict(kinds)


def teach(demo: Path, folder: Path, system: str, seed: int) -> dict:
    """Train a system; returns what it cost."""
    output, start = folder / "models" / system, demo / "models/staged"
    steps = STEPS
    if system == "answers":  # as many steps as cost what the other one does
        before = training_cost(start)["flops"] / read_json(start / "trainer_state.json")["global_step"]
        steps = round(training_cost(folder / "models/recombined")["flops"] / before)
    settings = {
        "model_name_or_path": start,
        "train_file": folder / "built/rows.jsonl",
        "image_root": demo / "problems",
        "corrections": TURNS[system],
        "max_steps": steps,
        "seed": seed,
    }
    return fit("sco/pocket", output, **settings)


def answer(demo: Path, folder: Path, system: str) -> dict[str, TurnGrades]:
    """A system's grades on the test questions, by id."""
    settings = {"corrections": TURNS.get(system, 0), "correction_prompt": CHECK, "max_new_tokens": 320}
    samples = measure_corrections(
        demo / "models/staged" if system == "staged" else folder / "models" / system,
        [row for _, row in read_jsonl(demo / "problems/test.jsonl")],
        folder / "eval" / system,
        settings,
        image_root=demo / "problems",
        batch_size=32,
        console=Console(quiet=True),
    )
    return grades_of(samples, "pocket")


def shown(interval: dict) -> str:
    return f"{100 * interval['value']:.1f} [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"


def main() -> None:
    given = command(__doc__).parse_args()
    groups: Counter = Counter()
    costs: dict[str, dict] = {system: {} for system in TURNS}
    grades: dict[str, list[TurnGrades]] = {system: [] for system, _ in SHOWN.values()}
    for seed, demo in enumerate(given.demos):
        folder = given.output / f"seed-{seed}"
        build(demo, folder / "built", seed)
        groups.update(mixed_share(demo, folder / "built"))
        for system in ("recombined", "answers"):
            costs[system][seed] = teach(demo, folder, system, seed)
        for system, answers in grades.items():
            answers.extend(answer(demo, folder, system).values())
    table = Table("system", "n", "right (%)", f"minus {BASE} (points)", "training TFLOPs")
    result: dict = {"groups": dict(groups), "costs": costs, "systems": {}}
    before = [grade.answer(0) for grade in grades[BASE]]
    for name, (system, turn) in SHOWN.items():
        change = flips(before, [grade.answer(turn) for grade in grades[system]], ROUNDS)
        result["systems"][name] = change
        spent = sum(cost["flops"] for cost in costs.get(system, {}).values()) / 1e12
        table.add_row(
            name, str(change["n"]), shown(change["after"]), shown(change["net_flips"]), f"{spent:.1f}"
        )
    write_json(given.output / "recombined.json", result)
    view = Console(width=120)
    view.print(table)
    view.print(", ".join(f"{kind}: {count}" for kind, count in sorted(groups.items())), "groups")


if __name__ == "__main__":
    main()
