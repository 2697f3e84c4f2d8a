"""Tagged rows of which every second one has no image."""

import json
from pathlib import Path

from tagged_rows import write_rows


def write_mixed_rows(folder: Path, count: int = 16) -> Path:
    path = write_rows(folder, count=count)
    rows = json.loads(path.read_text())
    for row in rows[::2]:
        del row["image"]
        question = row["conversations"][0]
        question["value"] = question["value"].removeprefix("<image>\n")
    path.write_text(json.dumps(rows))
    return path
