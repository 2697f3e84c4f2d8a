"""A whole self-training run in miniature: a tiny random LLaVA, eight questions, a recipe file."""

import json
from pathlib import Path

import families
import yaml
from json_lines import write_lines
from PIL import Image

SETTINGS = {
    "method": "r3v",
    "dtype": "float32",
    "dataset": "pocket",
    "num_rounds": 1,
    "samples_per_question": 3,
    "test_samples": 3,
    "max_new_tokens": 4,
    "sample_batch_size": 12,
    "bootstrap_rounds": 20,
    "seed": 0,
    "use_cpu": True,
    "per_device_train_batch_size": 8,
    "gradient_checkpointing": False,
    "max_steps": 20,
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "logging_steps": 10,
    "save_steps": 10,
    "save_total_limit": 1,
    "dpo": {"max_steps": 2, "learning_rate": 1.0e-4, "per_device_train_batch_size": 2},
}


def write_loop(folder: Path, **settings) -> Path:
    """Model, questions and recipe below `folder`; returns the recipe's path. Half of the answers are 1, half are 2, and
    the picture does not tell: whoever has learnt the form is right half of the time."""
    families.save(*families.llava(), folder / "base")
    (folder / "images").mkdir()
    for split in ("warmup", "train", "test"):
        rows = []
        for i in range(8):
            name = f"images/{split}{i}.png"
            Image.new("RGB", (28, 28), (30 * i, 100, 50)).save(folder / name)
            answer = str(i % 2 + 1)
            row = {"id": f"{split}{i}", "images": [name], "question": "How many?", "answer": answer}
            if split == "warmup":
                row["rationale"] = answer
            rows.append(row)
        write_lines(folder / f"{split}.jsonl", rows)
    recipe = {
        **SETTINGS,
        "model_name_or_path": str(folder / "base"),
        "image_root": str(folder),
        "output_dir": str(folder / "run"),
        "warmup_file": str(folder / "warmup.jsonl"),
        "train_questions": str(folder / "train.jsonl"),
        "test_questions": str(folder / "test.jsonl"),
        "use_direct": False,
        **settings,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in recipe.items() if v is not None}))
    return path


def outcome(run: Path) -> dict:
    """What two runs must agree on: every store, row file, weight and figure, without times."""
    files = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if (
            path.suffix in (".jsonl", ".csv")
            and ".vlm_sft_rl_index" not in name
            and "checkpoint-" not in name
        ):
            files[name] = path.read_text()
        elif path.name == "model.safetensors" and "checkpoint-" not in name:
            files[name] = path.read_bytes()
    summary = json.loads((run / "summary.json").read_text())
    return {**files, "rounds": summary["rounds"], "pools": summary["pools"], "rows": summary["rows"]}
