"""Training on a part of a file that is read as a whole."""

import torch


def subsampled(rows: list[dict], count: int | None, seed: int) -> list[dict]:
    """`count` rows drawn without replacement, in the file's order; all of them where there are no more, or for None."""
    if count is None or count >= len(rows):
        return rows
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]
    return [rows[i] for i in sorted(chosen.tolist())]
