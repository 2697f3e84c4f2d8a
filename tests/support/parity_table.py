"""The families' table of docs/parity.md: read, and written anew where WRITE_TABLE is set, by the tests that measure it."""

import os
from pathlib import Path

from vlm_sft_rl.parity.rows import sample_rows

GUIDE = Path(__file__).parents[2] / "docs" / "parity.md"
ROWS = ("short", "two pictures", "no picture")
# with their usual windows of 12 tokens nothing of a picture would reach the answer
SIZES = {"llava_mistral": {"window": 128}, "gemma3": {"window": 512}}


def rows_for(family: str) -> list[dict]:
    rows = [row for row in sample_rows(tagged=True) if row["id"] in ROWS]
    return rows[:2] if family == "paligemma" else rows  # its processor takes none without a picture


def cells_of(family: str) -> list[str]:
    """The cells of a family behind its name, the last of them that of vLLM."""
    lines = GUIDE.read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith(f"| `{family}` |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def check(family: str, measured: dict[int, str], why: object) -> None:
    """The table says what was measured: column -> verdict; `why` is shown where it does not."""
    cells = cells_of(family)
    wanted = list(cells)
    for column, verdict in measured.items():
        wanted[column] = verdict
    if os.environ.get("WRITE_TABLE"):
        old, new = (f"| `{family}` | {' | '.join(values)} |" for values in (cells, wanted))
        GUIDE.write_text(GUIDE.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
        cells = cells_of(family)
    assert cells == wanted, why
