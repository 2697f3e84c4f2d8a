"""Image-side preference (mDPO): DPO with damaged pictures and an anchor, against plain DPO.

    python eval/beyond/image_preference.py OUT DEMO…

Every DEMO is the finished folder of `vlm-sft-rl demo reverse`, one a seed. Chosen are its true training captions, rejected
the same with one phrase that is not there. From its control (the same captions, no tags) two systems go on:

    mdpo  recipes/mdpo/pocket.yaml: conditional preference and anchor, both of weight 1
    dpo   both weights 0, and twice the steps: a step of mDPO forwards and trains twice the tokens

Measured on the demo's test scenes, all seeds together: greedy captions, and yes/no questions. Finished parts are left out
when the command is given again. Writes `OUT/image_preference.json` and prints it as a table.
"""

from pathlib import Path

from injected import table
from rich.console import Console
from studies import answers_of, command, fit, measure, of_seed

from vlm_sft_rl.data.tagging.injected import write_injected
from vlm_sft_rl.data.tags import strip_tags
from vlm_sft_rl.io import read_jsonl, write_json, write_jsonl
from vlm_sft_rl.pocket.language import CAPTION_PROMPT

STEPS = 60
SYSTEMS = {
    "mdpo": {"max_steps": STEPS},
    "dpo": {"max_steps": 2 * STEPS, "image_weight": 0.0, "anchor_weight": 0.0},
}
FIGURES = {
    "pocket_captions": ("chair_i", "chair_i_distinct", "coverage", "repeats"),
    "pocket_yesno": ("accuracy",),
}


def write_pairs(demo: Path, folder: Path) -> Path:
    """Preference rows of the demo's tagged captions."""
    tagged = demo / "rows/reverse.jsonl"
    write_injected(tagged, folder / "wrong.jsonl", "{text}")
    wrong = {row["id"]: row["question"] for _, row in read_jsonl(folder / "wrong.jsonl")}
    right = {
        row["id"].removesuffix("-pos"): strip_tags(row["messages"][1]["content"])
        for _, row in read_jsonl(tagged)
        if row["id"].endswith("-pos")
    }
    images = {row["id"]: row["images"] for _, row in read_jsonl(folder / "wrong.jsonl")}
    rows = [
        {
            "id": name,
            "images": images[name],
            "prompt": [{"role": "user", "content": CAPTION_PROMPT}],
            "chosen": [{"role": "assistant", "content": right[name.rpartition("-")[0]]}],
            "rejected": [{"role": "assistant", "content": text}],
        }
        for name, text in wrong.items()
    ]
    write_jsonl(folder / "pairs.jsonl", rows)
    return folder / "pairs.jsonl"


def main() -> None:
    given = command(__doc__).parse_args()
    samples: dict = {spec: {system: [] for system in ("start", *SYSTEMS)} for spec in FIGURES}
    costs: dict[str, dict] = {system: {} for system in SYSTEMS}
    for seed, demo in enumerate(given.demos):
        folder = given.output / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        start = demo / "models/control"
        common = {"model_name_or_path": start, "image_root": demo / "world", "seed": seed}
        common["train_file"] = write_pairs(demo, folder)
        for system in ("start", *SYSTEMS):
            model = start if system == "start" else folder / "models" / system
            if system in SYSTEMS:
                costs[system][seed] = fit("mdpo/pocket", model, **common, **SYSTEMS[system])
            for spec in FIGURES:
                answers = answers_of(model, spec, folder / "eval" / f"{system}-{spec}", demo / "world")
                samples[spec][system] += of_seed(answers, seed)
        result: dict = {"costs": costs}
        for spec, names in FIGURES.items():
            result[spec] = measure(samples[spec], spec, names, ("start", "dpo"))
            Console(width=160).print(table(spec, result[spec], names))
        write_json(given.output / "image_preference.json", result)


if __name__ == "__main__":
    main()
