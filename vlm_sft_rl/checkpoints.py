"""Finding the checkpoint to go on from."""

import json
import re
from pathlib import Path

from .errors import UserError

# transformers writes this file last; a run killed while saving leaves a folder without it
LAST_FILE = "trainer_state.json"
WEIGHTS = ("*.safetensors", "*.distcp", "pytorch_model_fsdp_0", "global_step*")


def last_complete_checkpoint(output_dir: str | Path) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint that was written to its end, and the newer ones that were not.

    Returns:
        `(checkpoint or None, incomplete)`.
    """
    found = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        if (number := re.fullmatch(r"checkpoint-(\d+)", folder.name)) and folder.is_dir():
            found.append((int(number[1]), folder))
    incomplete = []
    for _, folder in sorted(found, reverse=True):
        if is_complete(folder):
            return folder, incomplete
        incomplete.append(folder)
    return None, incomplete


def is_complete(folder: str | Path) -> bool:
    """Whether a checkpoint has its weights and the state that is written after everything else."""
    folder = Path(folder)
    try:
        json.loads((folder / LAST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return any(next(folder.glob(pattern), None) is not None for pattern in WEIGHTS)


def resume_from(output_dir: str | Path, asked: str | None) -> tuple[Path | None, list[Path]]:
    """What to resume from: `asked` is None (the last complete one), `no` (start anew) or a folder.

    Raises:
        UserError: the folder asked for is not a complete checkpoint.
    """
    if asked is None or str(asked).lower() in ("true", "yes", "last"):
        return last_complete_checkpoint(output_dir)
    if str(asked).lower() in ("no", "false", "none"):
        return None, []
    if not is_complete(asked):
        raise UserError(
            f"{asked}: not a complete checkpoint (weights and {LAST_FILE}). Name another one, or leave "
            "`resume_from_checkpoint` out to go on from the last complete one."
        )
    return Path(asked), []
