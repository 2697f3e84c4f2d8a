"""Packing: several rows laid out as one sequence. Pure functions on tokens; no model, no images.

A pack is described by its *segments*, an int64 table (segments, 4) of `start, end, prefix_start, prefix_end`: tokens
`[start, end)` attend, causally, to themselves and to the prefix `[prefix_start, prefix_end)`. The segments cover the
sequence in order. A row of its own is one segment with an empty prefix (`prefix_start == prefix_end == start`). Rows
that share their beginning are one segment for that beginning and one *branch* each, whose prefix it is. A token's
place in its row is therefore `position - start + (prefix_end - prefix_start)`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..data.marks import IGNORE, Example

SEGMENTS = "segments"
Table = list[tuple[int, int, int, int]]


@dataclass(frozen=True)
class Row:
    """The tokens of one row in a pack.

    Attributes:
        example: ids, labels and weights.
        aligned: other values that go with the tokens, by name (`mm_token_type_ids`), each as long as the ids.
    """

    example: Example
    aligned: dict[str, list[int]]

    def __len__(self) -> int:
        return len(self.example.input_ids)


def shared_length(rows: Sequence[Row]) -> int:
    """How many tokens at their beginning the rows can share; 0 for a single row.

    Those that are equal in all of them, up to the last token before any supervised one: the token that predicts a
    label belongs to the branch, because in each branch it predicts another.
    """
    if len(rows) < 2:
        return 0
    limit = min(_first_label(row.example) - 1 for row in rows)
    if limit <= 0:
        return 0
    values = [np.array([row.example.input_ids[:limit] for row in rows])]
    values += [np.array([row.aligned[name][:limit] for row in rows]) for name in rows[0].aligned]
    differ = np.any([(v != v[:1]).any(axis=0) for v in values], axis=0)
    return int(differ.argmax()) if differ.any() else limit


def lay_out(
    groups: Sequence[Sequence[Row]], pad_id: int, multiple: int | None = None
) -> dict[str, torch.Tensor]:
    """One sequence out of groups of rows; the rows of a group share their common beginning.

    Args:
        groups: a row that shares nothing is a group of one.
        pad_id: the token for padding at the end, which is a segment of its own.
        multiple: pad the length up to a multiple of this.

    Returns:
        `input_ids`, `attention_mask` (0 on padding), `labels` (int64) and `loss_weights` (float32), each (1, length);
        every name of `Row.aligned` likewise (`doubts` float32); `segments` (segments, 4).
    """
    names = list(groups[0][0].aligned)
    ids, labels, weights = [], [], []
    aligned: dict[str, list[int]] = {name: [] for name in names}
    segments: list[tuple[int, int, int, int]] = []

    def append(row: Row, start: int, end: int, prefix: tuple[int, int] | None) -> tuple[int, int]:
        at = len(ids)
        ids.extend(row.example.input_ids[start:end])
        labels.extend(row.example.labels[start:end])
        weights.extend(row.example.weights[start:end])
        # nothing of this row comes before, so nothing can predict it (in a padded batch the shift drops it)
        labels[at], weights[at] = IGNORE, 0.0
        for name in names:
            aligned[name].extend(row.aligned[name][start:end])
        segments.append((at, len(ids), *(prefix or (at, at))))
        return at, len(ids)

    for group in groups:
        shared = shared_length(group)
        if not shared:
            for row in group:
                append(row, 0, len(row), None)
            continue
        prefix = append(group[0], 0, shared, None)
        for row in group:
            append(row, shared, len(row), prefix)
    real = len(ids)
    if multiple and (missing := -real % multiple):
        blank = Example([pad_id] * missing, [IGNORE] * missing, [0.0] * missing, ())
        append(Row(blank, {name: [0] * missing for name in names}), 0, missing, None)
    mask = np.zeros(len(ids), dtype=np.int64)
    mask[:real] = 1
    pack = {"input_ids": ids, "attention_mask": mask, "labels": labels, **aligned}
    kinds = {name: np.float32 if name == "doubts" else np.int64 for name in pack}
    return {
        **{n: torch.from_numpy(np.asarray(values, dtype=kinds[n]))[None] for n, values in pack.items()},
        "loss_weights": torch.from_numpy(np.asarray(weights, dtype=np.float32))[None],
        SEGMENTS: torch.tensor(segments, dtype=torch.int64),
    }


def as_table(segments: torch.Tensor) -> Table:
    return [tuple(row) for row in segments.tolist()]


def rows_of(table: Table) -> Iterator[tuple[int, int, int, int]]:
    """The segments that end a row: all but those that are only a prefix. Padding at the end counts as a row."""
    prefixes = {(p, q) for _, _, p, q in table if p != q}
    return (s for s in table if s[2] != s[3] or s[:2] not in prefixes)


def row_lengths(segments: torch.Tensor) -> list[int]:
    """The lengths of the rows of a pack, each with the beginning that it shares."""
    return [end - start + q - p for start, end, p, q in rows_of(as_table(segments))]


def sum_rows(values: torch.Tensor, segments: torch.Tensor | None) -> torch.Tensor:
    """(rows,): the sum of each row's values, which belong to the labels as shifted for prediction.

    Args:
        values: (batch, length - 1), 0 where there is no label; with segments the batch is one pack.
        segments: of a pack; None for a padded batch.
    """
    if segments is None:
        return values.sum(1)
    # the first token of a segment is predicted by nothing of its own and has no label
    sums = [values[0, start : end - 1].sum() for start, end, _, _ in rows_of(as_table(segments))]
    return torch.stack(sums)


def _first_label(example: Example) -> int:
    return next((i for i, label in enumerate(example.labels) if label != IGNORE), len(example.labels))
