"""Small tagged training files and prepared tiny checkpoints, for the tests of models, trainers and recipes."""

import json
from pathlib import Path

import families
from PIL import Image

from vlm_sft_rl.models.checkpoints import prepare

NOUNS = ["cat", "dog", "kettle", "star", "boat", "tree", "fish", "lamp"]


def write_rows(folder: Path, count: int = 8) -> Path:
    """`rows.json` in LLaVA's format and its images; every second answer ends in a hallucinated phrase."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        Image.linear_gradient("L").rotate(15 * i).convert("RGB").resize((56, 56)).save(folder / f"{i}.png")
        noun, other = NOUNS[i % 8], NOUNS[(i + 3) % 8]
        answer = f"There is <SPAN> a {noun} </CN> and <SPAN> a {other} </{'UN' if i % 2 else 'CN'}>"
        rows.append(
            {
                "id": f"row-{i}",
                "image": f"{i}.png",
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat is there?"},
                    {
                        "from": "gpt",
                        "value": answer if i % 2 else answer + ".",
                        "A_type": "general_answer",
                        "hint": other,
                    },
                ],
            }
        )
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def prepared(folder: Path, family: str = "llava", **kwargs) -> Path:
    """A tiny checkpoint of a family with verification tokens."""
    source = families.save(*getattr(families, family)(**kwargs), folder / "base")
    prepare(source, folder / "prepared")
    return folder / "prepared"


def write_mixed_rows(folder: Path, count: int = 16) -> Path:
    """The same, but every second row has no image."""
    path = write_rows(folder, count=count)
    rows = json.loads(path.read_text())
    for row in rows[::2]:
        del row["image"]
        question = row["conversations"][0]
        question["value"] = question["value"].removeprefix("<image>\n")
    path.write_text(json.dumps(rows))
    return path
