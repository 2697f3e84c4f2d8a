"""The families' table of docs/parity.md: read, and written anew where WRITE_TABLE is set, by the tests that measure it."""

import os
from pathlib import Path

GUIDE = Path(__file__).parents[2] / "docs" / "parity.md"


def row(family: str) -> list[str]:
    """The cells of a family behind its name, the last of them that of vLLM."""
    lines = GUIDE.read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith(f"| `{family}` |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def check(family: str, measured: dict[int, str], why: object) -> None:
    """The table says what was measured: column -> verdict; `why` is shown where it does not."""
    cells = row(family)
    wanted = list(cells)
    for column, verdict in measured.items():
        wanted[column] = verdict
    if os.environ.get("WRITE_TABLE"):
        old, new = (f"| `{family}` | {' | '.join(values)} |" for values in (cells, wanted))
        GUIDE.write_text(GUIDE.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
        cells = row(family)
    assert cells == wanted, why
