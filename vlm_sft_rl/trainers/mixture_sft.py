"""`MixtureSFTTrainer`: SFT on rows of several kinds, with a loss weight per kind.

A row's kind is the `answer_type` of its last answer (`direct`, `cot`, `refine`, `select`, …).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ..data.chat import get_tokenizer
from ..data.collators import VisionCollator
from ..data.marks import Example, Mark, delimiter_marks, require_untagged, verification_marks
from ..packing.collator import PackedCollator
from ..packing.layout import SEGMENTS, sum_rows
from ..settings import check_factors, setting
from .base import ForwardPass, WeightedSFTConfig, WeightedSFTTrainer, collator_settings

OTHER = "other"
ROW_KINDS = ("direct", "cot", "refine", "select")
ALL_KINDS = (*ROW_KINDS, OTHER)


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
    check_factors(weights, ALL_KINDS, "kind_weights")
    return [partial(kind_weight_mark, weights=weights)] if any(w != 1 for w in weights.values()) else []


class KindsMixin:
    """To be named before a collator: batches also have `row_kind` (rows,), the place of each row's kind in `ALL_KINDS`, in
    the order in which the rows stand in the batch or pack."""

    def tensors(self, features: Any, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        groups = getattr(features, "groups", None)
        order = range(len(examples)) if groups is None else [i for group in groups for i in group]
        kinds = [ALL_KINDS.index(row_kind(examples[i])) for i in order]
        return {**super().tensors(features, examples), "row_kind": torch.tensor(kinds)}


class KindCollator(KindsMixin, VisionCollator):
    """A `VisionCollator` with `row_kind`."""


class PackedKindCollator(KindsMixin, PackedCollator):
    """A `PackedCollator` with `row_kind`."""


@dataclass
class MixtureSFTConfig(WeightedSFTConfig):
    """`WeightedSFTConfig` plus what a mixture learns of its rows."""

    kind_weights: dict[str, Any] | str | None = setting(
        None,
        "Factor on the loss of each kind of row, for example {select: 2.0}. Kinds: "
        f"{', '.join(ROW_KINDS)}. None: 1 for all, as published.",
    )
    label_delimiters: bool = setting(
        False,
        "Also learn the delimiters of all turns (`<|im_start|>`, `<|im_end|>` and its newline), as the training "
        "code released with Qwen-VL does. Needs a ChatML template.",
    )


class MixtureSFTTrainer(WeightedSFTTrainer):
    """`WeightedSFTTrainer` on rows of several kinds. Without a `data_collator` a `KindCollator` is made.

    Logged besides TRL's metrics: `loss/KIND`, the mean negative log-likelihood per token of each kind of row.
    """

    _name = "MixtureSFT"
    CONFIG = MixtureSFTConfig
    COLUMNS: ClassVar = {
        "loss/": "",
    }
    EXTRA_TENSORS = ("row_kind",)

    def make_collator(self, processor, args: MixtureSFTConfig) -> KindCollator:
        return build_kind_collator(processor, args)

    def watch(self, outputs: ForwardPass, batch: Mapping[str, torch.Tensor]) -> None:
        if "row_kind" not in batch:
            return
        kinds, segments = batch["row_kind"].to(outputs.log_probs.device), batch.get(SEGMENTS)
        losses, tokens = (
            sum_rows(values, segments)[: len(kinds)].double()
            for values in (-outputs.log_probs, outputs.label_mask)
        )
        rows = F.one_hot(kinds, len(ALL_KINDS)).double()  # (rows, kinds)
        self.record_means([f"loss/{kind}" for kind in ALL_KINDS], rows.T @ losses, rows.T @ tokens)


def build_kind_collator(processor, args: MixtureSFTConfig, **kwargs) -> KindCollator:
    """The collator of a mixture: loss on the answers, weighted by kind; tagged rows keep their verification mask.

    Args:
        kwargs: `image_root`, `rejects_path`, … for `VisionCollator`.
    """
    packing = args.vision_packing
    make = KindCollator if packing == "none" else partial(PackedKindCollator, packing=packing)
    tokenizer = get_tokenizer(processor)
    delimiters = delimiter_marks(tokenizer) if args.label_delimiters else []
    verdicts = verification_marks(tokenizer) or [require_untagged]
    return make(
        processor,
        marks=[*verdicts, *delimiters, *kind_marks(args.kind_weights)],
        **collator_settings(args),
        **kwargs,
    )
