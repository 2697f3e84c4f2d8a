"""Find the injected error: GRPO on naming the wrong phrase of a caption, against more SFT on the same questions.

    python eval/beyond/injected.py OUT DEMO…

Every DEMO is the finished folder of `vlm-sft-rl demo reverse`, one a seed. Its negatives become questions. Its control (true
captions, no tags) first learns to answer from a third of them by SFT (`start`), because from the control itself no answer is
a phrase of the caption. From there, with the same compute (2 FLOPs a parameter for a token forwarded, 6 for one trained on):

    grpo   the other questions, reward `answer` with `grader: exact` (recipes/injected/pocket.yaml)
    sft    the same questions with their answers

Measured on the demo's test scenes, all seeds together: the share of injected errors that are named (three texts a picture,
the errors drawn as in training), and what it carries over to: greedy captions, and yes/no questions. Finished parts are left
out when the command is given again. Writes `OUT/injected.json` and prints it as a table.
"""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from studies import answers_of, command, fit, measure, of_seed, shown
from verdicts import SFT

from vlm_sft_rl.data.tagging.injected import write_injected
from vlm_sft_rl.data.tagging.pipeline import write_synthetic
from vlm_sft_rl.io import read_jsonl, write_json, write_jsonl
from vlm_sft_rl.pocket.language import CAPTION_PROMPT, THEME_PHRASES, with_article

SYSTEMS = ("control", "start", "grpo", "sft")
ERRORS = 3  # injected into the caption of a test picture
WARMUP_STEPS = 150
SPEC = """
name: injected
description: Which phrase of a caption is not true of the picture?
questions: test.jsonl
prompt: "{question}"
metric: answer_accuracy
metric_options: {grader: exact}
decoding: {max_new_tokens: 12}
files:
  - {path: test.jsonl, source: "written by `python eval/beyond/injected.py`"}
"""
FIGURES = {
    "injected": ("accuracy", "unreadable"),
    "pocket_captions": ("chair_i", "chair_i_distinct", "coverage", "repeats"),
    "pocket_yesno": ("accuracy",),
}


def write_data(demo: Path, folder: Path) -> None:
    """`start.jsonl` and `train.jsonl`, a third and the rest of the questions; `test.jsonl`, and its spec."""
    counts = write_injected(demo / "rows/reverse.jsonl", folder / "questions.jsonl")
    rows = [row for _, row in read_jsonl(folder / "questions.jsonl")]
    third = counts["questions"] // 3
    write_jsonl(folder / "start.jsonl", rows[:third])
    write_jsonl(folder / "train.jsonl", rows[third:])
    scenes = [row for _, row in read_jsonl(demo / "world/objects.jsonl") if row["split"] == "test"]
    write_jsonl(folder / "captions.jsonl", map(true_caption, scenes))
    write_synthetic(
        folder / "captions.jsonl", demo / "world/objects.jsonl", folder / "tagged.jsonl", negatives=ERRORS
    )
    write_injected(folder / "tagged.jsonl", folder / "test.jsonl")
    (folder / "injected.yaml").write_text(SPEC + f"image_root: {(demo / 'world').resolve()}\n")


def true_caption(scene: dict) -> dict:
    named = ", ".join(with_article(thing["noun"]) for thing in scene["objects"])
    text = f"{THEME_PHRASES[scene['theme']]} there is {named}."
    talk = [{"role": "user", "content": CAPTION_PROMPT}, {"role": "assistant", "content": text}]
    return {"id": scene["id"], "images": [scene["image"]], "messages": talk}


def teach(demo: Path, folder: Path, system: str, seed: int) -> dict:
    """Train a system; returns what it cost."""
    common = {"image_root": demo / "world", "seed": seed}
    output, control = folder / "models" / system, "reverse/pocket_control"
    if system == "start":
        rows = {"train_file": folder / "start.jsonl", "max_steps": WARMUP_STEPS, "save_steps": 10_000}
        return fit(control, output, **common, model_name_or_path=demo / "models/control", **rows)
    common |= {"model_name_or_path": folder / "models/start", "train_file": folder / "train.jsonl"}
    if system == "grpo":
        return fit("injected/pocket", output, **common)
    wanted = fit("injected/pocket", folder / "models/grpo", **common)["flops"]
    start = fit(control, folder / "models/start")
    return fit(control, output, **common, max_steps=round(wanted * WARMUP_STEPS / start["flops"]), **SFT)


def answer(demo: Path, folder: Path, system: str, spec: str) -> list[dict]:
    model = demo / "models/control" if system == "control" else folder / "models" / system
    output = folder / "eval" / f"{system}-{spec}"
    if spec == "injected":
        return answers_of(model, folder / "injected.yaml", output, folder)
    return answers_of(model, spec, output, demo / "world")


def table(title: str, figures: dict[str, dict], names: tuple[str, ...]) -> Table:
    view = Table("system", "n", *names, title=title)
    for system, row in figures.items():
        view.add_row(system, str(row["n"]), *(shown(row["metrics"][name]) for name in names))
    return view


def main() -> None:
    given = command(__doc__).parse_args()
    samples = {spec: {system: [] for system in SYSTEMS} for spec in FIGURES}
    costs: dict[str, dict] = {system: {} for system in SYSTEMS[1:]}
    for seed, demo in enumerate(given.demos):
        folder = given.output / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        write_data(demo, folder)
        for system in SYSTEMS:
            if system in costs:
                costs[system][seed] = teach(demo, folder, system, seed)
            for spec in FIGURES:
                samples[spec][system] += of_seed(answer(demo, folder, system, spec), seed)
        report(samples, costs, given.output)


def report(samples: dict[str, dict[str, list[dict]]], costs: dict[str, dict], output: Path) -> None:
    """What there is so far."""
    result: dict = {"costs": costs}
    for spec, names in FIGURES.items():
        place = output / "seed-0/injected.yaml" if spec == "injected" else spec
        result[spec] = measure(samples[spec], place, names)
        Console(width=160).print(table(spec, result[spec], names))
    write_json(output / "injected.json", result)


if __name__ == "__main__":
    main()
