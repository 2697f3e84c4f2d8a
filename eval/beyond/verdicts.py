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

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vlm_sft_rl import train
from vlm_sft_rl.correction.cost import training_cost
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.bootstrap import differences
from vlm_sft_rl.evaluation.metrics import load_metric
from vlm_sft_rl.evaluation.results import read_samples
from vlm_sft_rl.evaluation.runner import evaluate_spec
from vlm_sft_rl.evaluation.scoring import count_matrix, score, to_json
from vlm_sft_rl.evaluation.specs import EvalOptions, load_spec
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
)
# as of the GRPO runs
SFT = {
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5,
    "save_steps": 10_000,
}
METRICS = ("chair_i", "chair_i_distinct", "coverage", "repeats", "length")
ROUNDS = 1000


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


def fit(recipe: str, output: Path, **settings) -> dict:
    """Train by a recipe in this process; a finished run is left as it is. Returns what it cost."""
    if not (output / "model.safetensors").is_file():
        words = []
        for key, value in {"output_dir": output, **settings}.items():
            words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
        if train.main(["--config", recipe, *words]):
            raise UserError(f"{output}: training failed; the message is above.")
    return training_cost(output)


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
    output = folder / "eval" / f"{system}-{decoder}"
    settings = {}
    if decoder == "retrospective":
        chosen = read_json(demo / "models/reverse/vlm_sft_rl.json")
        settings = {"threshold": chosen["threshold"], **chosen["decoding"]}
    evaluate_spec(
        SPEC,
        model,
        output_dir=output,
        data_dir=demo / "world",
        decoder=decoder,
        settings=settings,
        options=EvalOptions(batch_size=64, report=False),
        console=Console(quiet=True),
    )
    return read_samples(output)


def measure(samples: dict[str, list[dict]], base: str) -> dict[str, dict]:
    """Figures of systems over all seeds, and their paired differences from `base`."""
    spec = load_spec(SPEC)
    metric = load_metric(spec.metric, spec.metric_options)
    counts = {system: count_matrix(answers, metric) for system, answers in samples.items()}
    figures = {}
    for system, answers in samples.items():
        scored = score(answers, metric, ROUNDS)
        figures[system] = {
            "n": scored["n"],
            "metrics": {name: scored["metrics"][name] for name in METRICS},
            "verifier": scored["verifier"],
            "cost": scored["cost"],
        }
        if system != base:
            gaps = differences(counts[system], counts[base], metric.statistics, ROUNDS)
            figures[system][f"minus_{base}"] = {name: to_json(gaps)[name] for name in METRICS}
    return figures


def shown(interval: dict) -> str:
    return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


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
    command = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    command.add_argument("output", type=Path)
    command.add_argument("demos", type=Path, nargs="+")
    given = command.parse_args()
    samples: dict[str, dict[str, list[dict]]] = {"greedy": {}, "retrospective": {}}
    costs: dict[str, dict] = {}
    for decoder, systems in PARTS:
        for seed, demo in enumerate(given.demos):
            folder = given.output / f"seed-{seed}"
            for system in systems:
                if system != "start":
                    costs.setdefault(system, {})[seed] = teach(demo, folder, system, seed)
                # pictures of different seeds have the same names
                samples[decoder].setdefault(system, []).extend(
                    {**sample, "id": f"{seed}/{sample['id']}"}
                    for sample in answer(demo, folder, system, decoder)
                )
            if seed + 1 == len(given.demos) or systems[0] == "start":
                report(samples, costs, given.output)


def report(samples: dict[str, dict[str, list[dict]]], costs: dict[str, dict], output: Path) -> None:
    """What there is so far."""
    result = {decoder: measure(of, "start") for decoder, of in samples.items() if of}
    write_json(output / "verdicts.json", {"costs": costs, **result})
    for decoder, figures in result.items():
        Console(width=200).print(table(decoder, figures))


if __name__ == "__main__":
    main()
