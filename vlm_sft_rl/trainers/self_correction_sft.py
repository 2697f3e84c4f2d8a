"""`SelfCorrectionSFTTrainer`: SFT on answers that are corrected, for LLaVA-SCo and its repair mode.

What is taught is decided in the collator (layout, masks, weights); this file only adds what is logged and the schedule of
the published run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from ..data.collators import VisionCollator
from ..data.corrections import (
    ATTEMPT_LOSSES,
    CHECK_LINE,
    LAYOUTS,
    POSITIONS,
    Layout,
    correction_marks,
    draft_ids,
    lay_out,
    stage_ids,
)
from ..data.marks import IGNORE, Example
from ..data.stages import STAGES
from ..errors import UserError
from ..models.parts import capture_outputs
from .base import RowSFTConfig, RowSFTTrainer, collator_settings

STAGE_NAMES = ("outside", *(stage.lower() for stage in STAGES))


@dataclass
class SelfCorrectionSFTConfig(RowSFTConfig):
    """`RowSFTConfig` plus how drafts are laid out and what their tokens weigh."""

    layout: str = field(
        default="turn",
        metadata={
            "help": "Where a correction stands: `turn`, a new user turn; `message`, behind the attempt in one answer; "
            "`stage`, inside of the answer, behind the stage named by `correction_after`.",
            "choices": list(LAYOUTS),
        },
    )
    corrections: int | None = field(
        default=None,
        metadata={
            "help": "Correction turns K of a row; rows with fewer repeat their last draft. 0: the last draft alone, as "
            "plain SFT. None: as many as a row has."
        },
    )
    correction_after: str = field(
        default="CONCLUSION",
        metadata={"help": "For `layout: stage`: the stage to correct behind.", "choices": list(POSITIONS)},
    )
    correction_prompt: str | None = field(
        default=None,
        metadata={
            "help": "For `layout: turn`: what the user asks before a correction. None: as the rows say."
        },
    )
    correction_line: str = field(
        default=CHECK_LINE,
        metadata={"help": "For `message` and `stage`: the line that leads from one draft to the next."},
    )
    attempt_loss: str = field(
        default="right",
        metadata={
            "help": "Loss on the drafts before the last: `right`, on those with a right conclusion (a row's "
            '`"weight": 0` says otherwise); `all`, as the released code; `none`.',
            "choices": list(ATTEMPT_LOSSES),
        },
    )
    attempt_weight: float = field(
        default=1.0, metadata={"help": "Factor on the loss of the drafts before the last."}
    )
    stage_weights: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Factor on the loss of each stage, for example {reasoning: 2.0}. Stages: "
            f"{', '.join(s.lower() for s in STAGES)}, other. None: 1 for all, as published."
        },
    )
    epoch_decay: float | None = field(
        default=None,
        metadata={
            "help": "Multiply the learning rate by this after every epoch and ignore `lr_scheduler_type` and warm-up; 0.85 "
            "is the published run's schedule. None: `lr_scheduler_type` decides."
        },
    )

    def __post_init__(self):
        if self.epoch_decay is not None and not 0 < self.epoch_decay <= 1:
            raise UserError(f"`epoch_decay` must lie in (0, 1], found {self.epoch_decay!r}.")
        super().__post_init__()

    def build_layout(self) -> Layout:
        """Raises UserError: settings that do not go together."""
        return Layout(
            self.layout,
            self.corrections,
            self.correction_after,
            self.attempt_loss,
            self.correction_prompt,
            self.correction_line,
        )


class CorrectionCollator(VisionCollator):
    """A `VisionCollator` that lays correction rows out, and says of every token which stage and draft it belongs to.

    Batches also have `stage_ids` (batch, length), 0 outside of stages and 1 to 4 for `STAGES`, and `draft_ids` (batch,
    length), 0 outside of answers, 1 for the attempt, k + 1 for correction k.
    """

    def __init__(self, processor, layout: Layout | None = None, **options):
        # before the base class: with `always_image` it prepares rows on trial
        self.layout = layout or Layout()
        super().__init__(processor, **options)

    def arrange(self, row: dict) -> dict:
        return lay_out(row, self.layout)

    def tensors(self, features: Any, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        batch = super().tensors(features, examples)
        for name, find in (("stage_ids", stage_ids), ("draft_ids", draft_ids)):
            tensor = torch.zeros_like(batch["labels"])
            for row, example in enumerate(examples):
                tensor[row, batch["attention_mask"][row].bool()] = torch.tensor(find(example))
            batch[name] = tensor
        return batch


class SelfCorrectionSFTTrainer(RowSFTTrainer):
    """TRL's SFT trainer on correction rows (`vlm_sft_rl.data.corrections`); ordinary rows may be mixed in.

    Same constructor as `trl.SFTTrainer`; without a `data_collator` a `CorrectionCollator` is made. With every weight 1 the
    loss is stock TRL's to the last bit on a CPU.

    Logged besides TRL's metrics, as mean negative log-likelihoods per supervised token: `loss/summary`, `loss/caption`,
    `loss/reasoning`, `loss/conclusion`, `loss/outside`; `loss/attempt` and `loss/correction`.

    Raises:
        UserError: settings that would go wrong in silence, or rows that teach nothing; before step 1.
    """

    _name = "SelfCorrectionSFT"
    CONFIG = SelfCorrectionSFTConfig

    def make_collator(self, processor, args: SelfCorrectionSFTConfig) -> CorrectionCollator:
        return build_correction_collator(processor, args)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        stages, drafts = inputs.pop("stage_ids", None), inputs.pop("draft_ids", None)
        with capture_outputs(model) as forwards:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if stages is not None:
            log_probs, mask = forwards[0].log_probs.detach(), inputs["labels"][:, 1:] != IGNORE
            self._log_parts(-log_probs, mask, stages[:, 1:], STAGE_NAMES)
            # the last draft of a row is its correction, whatever its number
            last = drafts.amax(1, keepdim=True)
            part = torch.where(drafts == last, 1, 0)
            self._log_parts(-log_probs, mask & (drafts[:, 1:] > 0), part[:, 1:], ("attempt", "correction"))
        return result

    def _log_parts(self, losses, mask, parts, names: Sequence[str]) -> None:
        """Add the mean loss of each part of one batch; every rank takes part, whatever parts it has."""
        found = torch.nn.functional.one_hot(parts[mask], len(names)).double()  # (tokens, parts)
        sums = torch.stack([found.T @ losses[mask].double(), found.sum(0)])
        means, counts = self.accelerator.reduce(sums, "sum").tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, loss, count in zip(names, means, counts, strict=True):
            if count:
                metrics[f"loss/{name}"].append(loss / count)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.args.epoch_decay is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        epochs = max(1, round(self.args.num_train_epochs))
        per_epoch = max(1, -(-num_training_steps // epochs))
        decay = self.args.epoch_decay
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: decay ** (step // per_epoch))
        self._created_lr_scheduler = True
        return self.lr_scheduler


def build_correction_collator(processor, args: SelfCorrectionSFTConfig, **kwargs) -> CorrectionCollator:
    """The collator that these settings ask for.

    Args:
        kwargs: `image_root`, `on_bad_row`, `rejects_path`, … for `VisionCollator`.

    Raises:
        UserError: settings that do not exist or do not go together.
    """
    return CorrectionCollator(
        processor,
        args.build_layout(),
        marks=correction_marks(args.attempt_weight, args.stage_weights),
        **collator_settings(args),
        **kwargs,
    )
