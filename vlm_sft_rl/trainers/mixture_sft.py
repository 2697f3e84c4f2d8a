"""Rows of several kinds in one mixture: a loss weight per kind, and the kind of every row beside its tokens.

A row's kind is the `answer_type` of its last answer (`direct`, `cot`, `refine`, `select`, …).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from ..data.chat import get_tokenizer
from ..data.collators import VisionCollator
from ..data.marks import Example, Mark, delimiter_marks, verification_marks
from ..errors import UserError
from ..models.parts import capture_outputs
from ..packing.collator import PackedCollator
from ..packing.layout import SEGMENTS, sum_rows
from .base import RowSFTConfig, RowSFTTrainer, collator_settings

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


# `VisionSFTTrainer`: supervised fine-tuning of vision-language models on mixtures of kinds of rows.
@dataclass
class VisionSFTConfig(RowSFTConfig):
    """`RowSFTConfig` plus what a mixture learns of its rows."""

    kind_weights: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Factor on the loss of each kind of row, for example {select: 2.0}. Kinds: "
            f"{', '.join(ROW_KINDS)}. None: 1 for all, as published."
        },
    )
    label_delimiters: bool = field(
        default=False,
        metadata={
            "help": "Also learn the delimiters of all turns (`<|im_start|>`, `<|im_end|>` and its newline), as the training "
            "code released with Qwen-VL does. Needs a ChatML template."
        },
    )


class VisionSFTTrainer(RowSFTTrainer):
    """TRL's SFT trainer on raw rows of several kinds.

    Same constructor as `trl.SFTTrainer`. Without a `data_collator` a `KindCollator` is made.

    Logged besides TRL's metrics: `loss/KIND`, the mean negative log-likelihood per token of each kind of row.

    Raises:
        UserError: as `RowSFTTrainer`.
    """

    _name = "VisionSFT"
    CONFIG = VisionSFTConfig

    def make_collator(self, processor, args: VisionSFTConfig) -> KindCollator:
        return build_kind_collator(processor, args)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        kinds, segments = inputs.pop("row_kind", None), inputs.get(SEGMENTS)
        with capture_outputs(model) as forwards:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if kinds is not None:
            found = forwards[0].log_probs.detach(), forwards[0].label_mask
            self._log_kinds(*(sum_rows(values, segments)[: len(kinds)] for values in found), kinds)
        return result

    def _log_kinds(self, log_probs: torch.Tensor, counts: torch.Tensor, kinds: torch.Tensor) -> None:
        """Add each kind's mean loss of one batch; every rank takes part, whatever kinds it has. All are (rows,)."""
        names = (*ROW_KINDS, OTHER)
        rows = torch.nn.functional.one_hot(kinds.to(log_probs.device), len(names)).double()  # (rows, kinds)
        sums = torch.stack([rows.T @ -log_probs.double(), rows.T @ counts.double()])
        losses, tokens = self.accelerator.reduce(sums, "sum").tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, loss, count in zip(names, losses, tokens, strict=True):
            if count:
                metrics[f"loss/{name}"].append(loss / count)


def build_kind_collator(processor, args: VisionSFTConfig, **kwargs) -> KindCollator:
    """The collator of a mixture: loss on the answers, weighted by kind; tagged rows keep their verification mask.

    Args:
        kwargs: `image_root`, `on_bad_row`, `rejects_path`, … for `VisionCollator`.
    """
    packing = args.vision_packing
    make = KindCollator if packing == "none" else partial(PackedKindCollator, packing=packing)
    tokenizer = get_tokenizer(processor)
    delimiters = delimiter_marks(tokenizer) if args.label_delimiters else []
    return make(
        processor,
        marks=[*verification_marks(tokenizer), *delimiters, *kind_marks(args.kind_weights)],
        **collator_settings(args),
        **kwargs,
    )
