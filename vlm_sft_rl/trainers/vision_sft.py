"""`VisionSFTTrainer`: supervised fine-tuning of vision-language models on mixtures of kinds of rows."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..data.delimiters import delimiter_marks
from ..data.marks import verification_marks
from ..data.packing import SEGMENTS, sum_rows
from ..data.row_kinds import OTHER, ROW_KINDS, KindCollator, PackedKindCollator, kind_marks
from ..models.tokens import get_tokenizer
from .recording import recorded
from .row_sft import RowSFTTrainer, collator_settings
from .row_sft_config import RowSFTConfig


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
        with recorded(model) as forwards:
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
