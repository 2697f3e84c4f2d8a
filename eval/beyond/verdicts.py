"""Verdicts as credit: GRPO in which verdicts earn and wrong phrases lose credit, against plain GRPO and more REVERSE.

    python eval/beyond/verdicts.py OUT DEMO…

Every DEMO is the finished folder of `vlm-sft-rl demo reverse`, one a seed. From its verifier four systems go on with the
same compute (2 FLOPs a parameter for a token forwarded, 6 for one trained on):

    grpo      reward `objects` alone: F1 of the objects that the caption names
    credit    the same, and tokens of wrong phrases have the advantage A - 0.1 |A|
    verdicts  rewards `objects` and half of `verdicts`, and that credit (recipes/verdicts/pocket.yaml)
    sft       more steps of REVERSE on its own rows, as many as cost the same as `grpo`

Measured on the demo's test scenes, all seeds together: greedy captions, the area under the ROC curve of P(</UN>) at the
model's own phrases, and captions resampled without replacement as the demo's validation scenes chose. Finished parts are
left out when the command is given again. Writes `OUT/verdicts.json` and prints it as a table.
"""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from studies import answers_of, as_demo_chose, command, fit, measure, of_seed, shown

from vlm_sft_rl.correction.cost import training_cost
from vlm_sft_rl.io import read_json, read_jsonl, write_json, write_jsonl
from vlm_sft_rl.pocket.language import CAPTION_PROMPT

SPEC, RECIPE = "pocket_captions", "verdicts/pocket"
PLAIN = {"rewards": ["objects"], "reward_weights": [1.0], "span_credit": 0.0}
GRPO = {"grpo": PLAIN, "credit": PLAIN | {"span_credit": 0.1}, "verdicts": {}}
# what is measured, the most telling first
PARTS = (
    ("greedy", ("start", "grpo", "verdicts", "sft")),
    ("greedy", ("credit",)),
    ("retrospective", ("start", "grpo", "verdicts", "sft")),
    ("retrospective", ("credit",)),
)
# as of the GRPO runs
SFT = {
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5,
    "save_steps": 10_000,
}
METRICS = ("chair_i", "chair_i_distinct", "coverage", "repeats", "length")


def questions(demo: Path, target: Path) -> Path:
    """Caption questions about the training pictures, with their objects."""
    scenes = (row for _, row in read_jsonl(demo / "world/objects.jsonl") if row["split"] == "train")
    write_jsonl(
        target,
        [
            {
                "id": scene["id"],
                "images": [scene["image"]],
                "question": CAPTION_PROMPT,
                "objects": [thing["noun"] for thing in scene["objects"]],
            }
            for scene in scenes
        ],
    )
    return target


def teach(demo: Path, folder: Path, system: str, seed: int) -> dict:
    """Train a system; returns what it cost."""
    start, output = demo / "models/reverse", folder / "models" / system
    common = {"model_name_or_path": start, "image_root": demo / "world", "seed": seed}
    if system in GRPO:
        asked = questions(demo, folder / "questions.jsonl")
        return fit(RECIPE, output, **common, train_file=asked, **GRPO[system])
    before = training_cost(start)
    steps = read_json(start / "trainer_state.json")["global_step"]
    wanted = training_cost(folder / "models/grpo")["flops"]
    more = round(wanted / (before["flops"] / steps))
    rows = demo / "rows/reverse.jsonl"
    return fit("reverse/pocket", output, **common, train_file=rows, max_steps=more, **SFT)


def answer(demo: Path, folder: Path, system: str, decoder: str) -> list[dict]:
    """A system's captions of the test scenes."""
    model = demo / "models/reverse" if system == "start" else folder / "models" / system
    settings = as_demo_chose(demo) if decoder == "retrospective" else None
    return answers_of(model, SPEC, folder / "eval" / f"{system}-{decoder}", demo / "world", decoder, settings)


def table(title: str, figures: dict[str, dict]) -> Table:
    view = Table("system", "n", *METRICS, "area", "wrong phrases", title=title)
    for system, row in figures.items():
        verifier = row["verifier"] or {"auc": None, "wrong_phrases": 0}
        area = "–" if verifier["auc"] is None else shown(verifier["auc"])
        view.add_row(
            system,
            str(row["n"]),
            *(shown(row["metrics"][name]) for name in METRICS),
            area,
            str(verifier["wrong_phrases"]),
        )
    return view


def main() -> None:
    given = command(__doc__).parse_args()
    samples: dict[str, dict[str, list[dict]]] = {"greedy": {}, "retrospective": {}}
    costs: dict[str, dict] = {}
    for decoder, systems in PARTS:
        for seed, demo in enumerate(given.demos):
            folder = given.output / f"seed-{seed}"
            for system in systems:
                if system != "start":
                    costs.setdefault(system, {})[seed] = teach(demo, folder, system, seed)
                answers = of_seed(answer(demo, folder, system, decoder), seed)
                samples[decoder].setdefault(system, []).extend(answers)
            if seed + 1 == len(given.demos) or systems[0] == "start":
                report(samples, costs, given.output)


def report(samples: dict[str, dict[str, list[dict]]], costs: dict[str, dict], output: Path) -> None:
    """What there is so far."""
    result = {decoder: measure(of, SPEC, METRICS, ("start", "grpo")) for decoder, of in samples.items() if of}
    write_json(output / "verdicts.json", {"costs": costs, **result})
    for decoder, figures in result.items():
        Console(width=200).print(table(decoder, figures))


if __name__ == "__main__":
    main()
