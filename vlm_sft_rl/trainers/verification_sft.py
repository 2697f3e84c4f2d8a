"""`VerificationSFTTrainer`: SFT with verification tokens, for REVERSE (arXiv 2504.13169, section 3.2).

What is taught is in the collator (labels and weights); this file only watches the verdicts.
"""

import math
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from peft.utils.other import TrainableTokensWrapper
from torch.distributed.tensor import DTensor
from trl.trainer.utils import maybe_gather_lm_head_ctx

from ..data.collators import VisionCollator
from ..data.marks import VerificationIds, closing_weight_mark, verification_mark
from ..models.parts import capture_outputs
from ..models.tokens import require_verification_tokens
from ..packing.collator import PackedCollator
from ..roc import roc_auc
from .base import RowSFTConfig, RowSFTTrainer, collator_settings
from .losses import unconfident_probabilities


# Settings of `VerificationSFTTrainer`.
@dataclass
class VerificationSFTConfig(RowSFTConfig):
    """`RowSFTConfig` plus the settings of verification training."""

    close_tag_weight: float = field(
        default=1.0,
        metadata={"help": "Factor on the loss of `</CN>` and `</UN>`. 1 is the published loss."},
    )
    hint_probability: float = field(
        default=0.2,
        metadata={
            "help": "Probability that a row's hint is added to its question, for `general_answer` turns that have one. "
            "0.2 is the published value; it teaches the model to use the hints of query rewriting."
        },
    )
    verdict_metrics: bool = field(
        default=True,
        metadata={
            "help": "Log verdict accuracy, P(</UN>) at both kinds of closing tags, and their ROC area."
        },
    )


VERDICTS_KEPT = 2000


class VerificationSFTTrainer(RowSFTTrainer):
    """Supervised fine-tuning on answers whose phrases carry verification tags.

    Same constructor as `trl.SFTTrainer`. The differences: `args` is a `VerificationSFTConfig`; without a
    `data_collator` a `VisionCollator` with the verification mark is made, so `train_dataset` holds raw rows
    (`messages` + `images`, see `vlm_sft_rl.data.rows`); a collator's `loss_weights` weigh each token's loss. The sum is
    divided by the number of supervised tokens, whatever their weights, as the published loss is.

    Logged besides TRL's metrics: `verdict_accuracy` (is the likelier of the two closing tags the right one),
    `p_unconfident/on_confident`, `p_unconfident/on_unconfident` (mean P(`</UN>`) at closing tags of each kind) and
    `verdict_auc` (ROC area of P(`</UN>`) over the last 2000 closing tags this process saw).

    Raises:
        UserError: as `RowSFTTrainer`, or the verification tokens are missing.
    """

    _name = "VerificationSFT"
    CONFIG = VerificationSFTConfig

    def __init__(self, *args, **kwargs):
        self._verdicts = {mode: deque(maxlen=VERDICTS_KEPT) for mode in ("train", "eval")}
        super().__init__(*args, **kwargs)

    def check_model(self, processor, source, model) -> None:
        self.verification = VerificationIds(*require_verification_tokens(processor, source, model))

    def make_collator(self, processor, args: VerificationSFTConfig) -> VisionCollator:
        return build_collator(processor, args)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        watch = capture_outputs(self._plain_model.base_model) if self.args.verdict_metrics else nullcontext()
        with capture_outputs(model) as forwards, watch as backbone:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if backbone is not None:
            hidden = backbone[0].last_hidden_state
            self._watch_verdicts(forwards[0].log_probs, inputs["labels"][:, 1:], hidden)
        return result

    @torch.no_grad()
    def _watch_verdicts(self, log_probs, labels, hidden) -> None:
        """Add the verdict metrics of one batch; every rank takes part, with or without closing tags."""
        head, ids = self._plain_model.get_output_embeddings(), self.verification.closing
        p, truth, right = unconfident_probabilities(
            log_probs,
            labels,
            hidden[:, :-1],
            output_rows(head, ids),
            ids,
            self.model.config.get_text_config(),
        )
        sums = torch.stack(
            [(~truth).sum(), truth.sum(), p[~truth].sum(), p[truth].sum(), right.sum()]
        ).double()
        on_cn, on_un, p_cn, p_un, correct = self.accelerator.reduce(sums, "sum").tolist()
        mode = "train" if self.model.training else "eval"
        metrics, verdicts = self._metrics[mode], self._verdicts[mode]
        if mode == "train":
            self._verdicts["eval"].clear()  # each evaluation starts anew
        if on_cn + on_un:
            metrics["verdict_accuracy"].append(correct / (on_cn + on_un))
        if on_cn:
            metrics["p_unconfident/on_confident"].append(p_cn / on_cn)
        if on_un:
            metrics["p_unconfident/on_unconfident"].append(p_un / on_un)
        verdicts.extend(zip(p.tolist(), truth.tolist(), strict=True))
        if verdicts and not math.isnan(area := roc_auc(*zip(*verdicts, strict=True))):
            metrics["verdict_auc"].append(area)


def build_collator(processor, args: VerificationSFTConfig, **kwargs) -> VisionCollator:
    """The collator of verification training: mask inside of hallucinated phrases, weight on closing tags, hints.

    Args:
        kwargs: `image_root`, `on_bad_row`, `rejects_path`, … for `VisionCollator`.
    """
    ids = VerificationIds(*require_verification_tokens(processor, "the processor"))
    marks = [partial(verification_mark, ids=ids)]
    if args.close_tag_weight != 1:
        marks.append(partial(closing_weight_mark, ids=ids, weight=args.close_tag_weight))
    if args.vision_packing == "none":
        make = VisionCollator
    else:
        make = partial(PackedCollator, packing=args.vision_packing)
    return make(
        processor,
        marks=marks,
        hint_probability=args.hint_probability,
        **collator_settings(args),
        **kwargs,
    )


def output_rows(head: torch.nn.Module, ids: tuple[int, ...]) -> torch.Tensor:
    """Rows (n, width) of the output embedding, also when PEFT trains them or they are sharded."""
    if isinstance(head, TrainableTokensWrapper):
        adapter = head.token_adapter
        for name in adapter.active_adapters:
            if set(ids) <= set(places := adapter.token_indices[name]):
                return adapter.trainable_tokens_delta[name][[places.index(i) for i in ids]]
        head = adapter.get_base_layer()
    weight = head.weight
    with maybe_gather_lm_head_ctx(weight):
        rows = weight.full_tensor() if isinstance(weight, DTensor) else weight
        return rows[list(ids)].clone()
