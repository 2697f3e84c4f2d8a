"""Preference rows: `{"id", "images", "prompt", "chosen", "rejected", "pair_kind"?, "pair_weight"?}` -> DPO batches."""

from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from .collators import VisionCollator, place
from .marks import IGNORE
from .problems import FORMAT, RowError
from .rows import read_raw, strip_none

PAIR_KINDS = ("cot", "refine", "select", "other")


def read_pairs(path: str | Path) -> list[dict]:
    """All preference rows of a JSON or JSONL file, checked.

    Raises:
        UserError: a field is missing or of the wrong type, chosen and rejected are equal, or the file is empty.
    """
    rows = [check_pair(strip_none(raw), f"{path}, row {number}") for number, raw in read_raw(path)]
    if not rows:
        raise UserError(f"{path}: there is no pair in it.")
    return rows


def check_pair(row: dict, where: str) -> dict:
    """The row with texts as message lists and every optional field filled. Raises RowError."""
    found: dict[str, Any] = {"id": str(row.get("id", where)), "images": list(row.get("images") or [])}
    for name, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
        value = row.get(name)
        messages = [{"role": role, "content": value}] if isinstance(value, str) else value
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise RowError(FORMAT, f"field `{name}`: expected text or messages, found {value!r:.80}.", where)
        found[name] = [{"role": m.get("role", role), "content": m.get("content")} for m in messages]
    if found["chosen"] == found["rejected"]:
        raise RowError(FORMAT, "`chosen` and `rejected` are equal, so there is nothing to prefer.", where)
    kind, weight = row.get("pair_kind", "other"), row.get("pair_weight", 1.0)
    if kind not in PAIR_KINDS:
        raise RowError(FORMAT, f"`pair_kind` {kind!r} is not one of {', '.join(PAIR_KINDS)}.", where)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight < 0:
        raise RowError(FORMAT, f"`pair_weight` must be a number >= 0, found {weight!r}.", where)
    return {**found, "pair_kind": kind, "pair_weight": float(weight)}


class PreferenceCollator:
    """Collates preference rows as `DPOTrainer` expects them: all chosen answers, then all rejected ones.

    Built on `VisionCollator`, so prompts are tokenised exactly as in SFT, images are opened in the workers and nothing is
    ever cut.

    Args:
        options: of `VisionCollator`, among them `image_root` and `max_length`.

    Calling it returns the processor's tensors for 2 x pairs rows (images twice), `completion_mask` of the same shape as
    `input_ids`, and, per pair, `pair_kind` (place in `PAIR_KINDS`) and `pair_weight`.
    """

    def __init__(self, processor, **options):
        self.collator = VisionCollator(processor, **options)

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        pairs = [check_pair(strip_none(dict(row)), place(row)) for row in rows]
        sides = [_side(pair, name) for name in ("chosen", "rejected") for pair in pairs]
        batch = self.collator(sides)
        batch.pop("loss_weights")
        mask = (batch.pop("labels") != IGNORE).long()
        return {
            **batch,
            "completion_mask": mask,
            "pair_kind": torch.tensor([PAIR_KINDS.index(pair["pair_kind"]) for pair in pairs]),
            "pair_weight": torch.tensor([pair["pair_weight"] for pair in pairs]),
        }


def _side(pair: dict, name: str) -> dict:
    return {
        "id": f"{pair['id']}/{name}",
        "images": pair["images"],
        "messages": [*pair["prompt"], *pair[name]],
    }
