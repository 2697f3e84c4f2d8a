"""`SelfCorrectionSFTTrainer`: SFT on answers that are corrected, for LLaVA-SCo and its repair mode.

What is taught is in the collator (layout, masks, weights); the trainer adds what is logged and the published schedule.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
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
from ..data.marks import Example
from ..data.stages import STAGES
from ..errors import UserError
from ..settings import setting
from .base import ForwardPass, WeightedSFTConfig, WeightedSFTTrainer, collator_settings

STAGE_NAMES = ("outside", *(stage.lower() for stage in STAGES))


@dataclass
class SelfCorrectionSFTConfig(WeightedSFTConfig):
    """`WeightedSFTConfig` plus how drafts are laid out and what their tokens weigh."""

    layout: str = setting(
        "turn",
        "Where a correction stands: `turn`, a new user turn; `message`, behind the attempt in one answer; "
        "`stage`, inside of the answer, behind the stage named by `correction_after`.",
        choices=list(LAYOUTS),
    )
    corrections: int | None = setting(
        None,
        "Correction turns K of a row; rows with fewer repeat their last draft. 0: the last draft alone, as "
        "plain SFT. None: as many as a row has.",
    )
    correction_after: str = setting(
        "CONCLUSION", "For `layout: stage`: the stage to correct behind.", choices=list(POSITIONS)
    )
    correction_prompt: str | None = setting(
        None, "For `layout: turn`: what the user asks before a correction. None: as the rows say."
    )
    correction_line: str = setting(
        CHECK_LINE, "For `message` and `stage`: the line that leads from one draft to the next."
    )
    attempt_loss: str = setting(
        "right",
        "Loss on the drafts before the last: `right`, on those with a right conclusion (a row's "
        '`"weight": 0` says otherwise); `all`, as the released code; `none`.',
        choices=list(ATTEMPT_LOSSES),
    )
    attempt_weight: float = setting(1.0, "Factor on the loss of the drafts before the last.")
    stage_weights: dict[str, Any] | str | None = setting(
        None,
        "Factor on the loss of each stage, for example {reasoning: 2.0}. Stages: "
        f"{', '.join(s.lower() for s in STAGES)}, other. None: 1 for all, as published.",
    )
    epoch_decay: float | None = setting(
        None,
        "Multiply the learning rate by this after every epoch and ignore `lr_scheduler_type` and warm-up; 0.85 "
        "is the published run's schedule. None: `lr_scheduler_type` decides.",
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


class SelfCorrectionSFTTrainer(WeightedSFTTrainer):
    """`WeightedSFTTrainer` on correction rows (`vlm_sft_rl.data.corrections`); ordinary rows may be mixed in.

    Without a `data_collator` a `CorrectionCollator` is made.

    Logged besides TRL's metrics, as mean negative log-likelihoods per supervised token: `loss/summary`, `loss/caption`,
    `loss/reasoning`, `loss/conclusion`, `loss/outside`; `loss/attempt` and `loss/correction`.
    """

    _name = "SelfCorrectionSFT"
    CONFIG = SelfCorrectionSFTConfig
    METHOD = "sco"
    COLUMNS: ClassVar = {
        "loss/": "",
    }
    EXTRA_TENSORS = ("stage_ids", "draft_ids")

    def make_collator(self, processor, args: SelfCorrectionSFTConfig) -> CorrectionCollator:
        return build_correction_collator(processor, args)

    def watch(self, outputs: ForwardPass, batch: Mapping[str, torch.Tensor]) -> None:
        if "stage_ids" not in batch:
            return
        stages, drafts = batch["stage_ids"][:, 1:], batch["draft_ids"]
        self._record_parts(outputs, outputs.label_mask, stages, STAGE_NAMES)
        # the last draft of a row is its correction, whatever its number
        is_last = (drafts == drafts.amax(1, keepdim=True)).long()[:, 1:]
        in_answer = outputs.label_mask & (drafts[:, 1:] > 0)
        self._record_parts(outputs, in_answer, is_last, ("attempt", "correction"))

    def _record_parts(self, outputs: ForwardPass, mask, parts, names: Sequence[str]) -> None:
        """Log the mean loss of each part of a batch; `parts` (batch, length - 1) are places in `names`."""
        belongs = F.one_hot(parts[mask], len(names)).double()  # (tokens, parts)
        sums = belongs.T @ -outputs.log_probs[mask].double()
        self.record_means([f"loss/{name}" for name in names], sums, belongs.sum(0))

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
        kwargs: `image_root`, `rejects_path`, … for `VisionCollator`.

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
