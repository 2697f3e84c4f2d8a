"""Staged questions over drawn pictures, and a tiny checkpoint, for the tests of self-correction."""

from pathlib import Path

import families
from json_lines import write_lines
from PIL import Image

from vlm_sft_rl.data.stages import Staged, format_staged


def staged(number) -> str:
    return format_staged(
        Staged("I count.", f"{number} cats", f"1 plus {number} equals {int(number) + 1}.", str(number))
    )


def write_questions(folder: Path, count: int = 6) -> Path:
    """`questions.jsonl` (answer k, true staged answer) with one picture each; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for k in range(count):
        Image.new("RGB", (28, 28), (k * 40, 90, 200 - k * 30)).save(folder / f"{k}.png")
        rows.append(
            {
                "id": f"q{k}",
                "images": [f"{k}.png"],
                "question": f"How many cats, {k}?",
                "answer": str(k),
                "staged": staged(k),
                "category": "even" if k % 2 == 0 else "odd",
            }
        )
    path = folder / "questions.jsonl"
    write_lines(path, rows)
    return path


def write_checkpoint(folder: Path) -> Path:
    model, processor = families.llava()
    return families.save(model, processor, folder)
