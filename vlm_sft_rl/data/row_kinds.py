"""Rows of several kinds in one mixture: a loss weight per kind, and the kind of every row beside its tokens.

A row's kind is the `answer_type` of its last answer (`direct`, `cot`, `refine`, `select`, …).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..errors import UserError
from .collators import VisionCollator
from .marks import Example, Mark
from .packed_collator import PackedCollator

ROW_KINDS = ("direct", "cot", "refine", "select")
OTHER = "other"


def row_kind(example: Example) -> str:
    """The kind of a tokenised row, `other` when its answer says none that is known."""
    kind = example.turns[-1].message.get("answer_type") if example.turns else None
    return kind if kind in ROW_KINDS else OTHER


def kind_weight_mark(example: Example, *, weights: Mapping[str, float]) -> Example:
    """Multiply the loss weights of a row by the weight of its kind (1 where none is given)."""
    factor = weights.get(row_kind(example), 1.0)
    return example if factor == 1 else replace(example, weights=[w * factor for w in example.weights])


def kind_marks(weights: Mapping[str, float] | None) -> list[Mark]:
    """The mark for these weights; nothing where all are 1.

    Raises:
        UserError: a kind that does not exist, or a negative weight.
    """
    weights = dict(weights or {})
    for kind, weight in weights.items():
        if kind not in (*ROW_KINDS, OTHER):
            raise UserError(f"`kind_weights`: {kind!r} is not one of {', '.join((*ROW_KINDS, OTHER))}.")
        if not isinstance(weight, int | float) or weight < 0:
            raise UserError(f"`kind_weights.{kind}` must be a number >= 0, found {weight!r}.")
    return [partial(kind_weight_mark, weights=weights)] if any(w != 1 for w in weights.values()) else []


class KindsMixin:
    """To be named before a collator: batches also have `row_kind` (rows,), the place of each row's kind in `ROW_KINDS`, in
    the order of the batch; `len(ROW_KINDS)` stands for any other."""

    def _tensors(self, features: Any, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        groups = getattr(features, "groups", None)
        order = range(len(examples)) if groups is None else [i for group in groups for i in group]
        kinds = [(*ROW_KINDS, OTHER).index(row_kind(examples[i])) for i in order]
        return {**super()._tensors(features, examples), "row_kind": torch.tensor(kinds)}


class KindCollator(KindsMixin, VisionCollator):
    """A `VisionCollator` with `row_kind`."""


class PackedKindCollator(KindsMixin, PackedCollator):
    """A `PackedCollator` with `row_kind`, in the order in which the rows stand in the pack."""
