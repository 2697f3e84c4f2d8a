"""`VerificationSFTTrainer`: SFT with verification tokens, for REVERSE (arXiv 2504.13169, section 3.2).

What is taught is in the collator (labels and weights); this file only watches the verdicts.
"""

import dataclasses
import logging
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from peft import PeftModel
from peft.utils.other import TrainableTokensWrapper
from torch.distributed.tensor import DTensor
from trl.trainer.utils import maybe_gather_lm_head_ctx

from ..data.collators import VisionCollator
from ..data.marks import VerificationIds, closing_weight_mark, verification_mark
from ..models.lora import frozen_rows, with_token_rows
from ..models.tokens import require_verification_tokens
from ..packing.collator import PackedCollator
from ..roc import roc_auc
from ..settings import setting
from .base import ForwardPass, WeightedSFTConfig, WeightedSFTTrainer, collator_settings
from .checks import check_tagged
from .losses import unconfident_probabilities

VERDICTS_KEPT = 2000

logger = logging.getLogger(__name__)


@dataclass
class VerificationSFTConfig(WeightedSFTConfig):
    """`WeightedSFTConfig` plus the settings of verification training."""

    close_tag_weight: float = setting(
        1.0, "Factor on the loss of `</CN>` and `</UN>`. 1 is the published loss."
    )
    hint_probability: float = setting(
        0.2,
        "Probability that a row's hint is added to its question, for `general_answer` turns that have one. "
        "0.2 is the published value; it teaches the model to use the hints of query rewriting.",
    )
    verdict_metrics: bool = setting(
        True, "Log verdict accuracy, P(</UN>) at both kinds of closing tags, and their ROC area."
    )


class VerificationSFTTrainer(WeightedSFTTrainer):
    """`WeightedSFTTrainer` on answers whose phrases carry verification tags.

    Without a `data_collator` a `VisionCollator` with the verification mark is made, so `train_dataset` holds raw rows
    (`messages` + `images`, see `vlm_sft_rl.data.rows`). The loss is the published one, divided by the number of supervised
    tokens whatever their weights.

    Logged besides TRL's metrics: `verdict_accuracy` (is the likelier of the two closing tags the right one),
    `p_unconfident/on_confident`, `p_unconfident/on_unconfident` (mean P(`</UN>`) at closing tags of each kind) and
    `verdict_auc` (ROC area of P(`</UN>`) over the last 2000 closing tags this process saw).

    Raises:
        UserError: as `WeightedSFTTrainer`, the verification tokens are missing, or no row has an answer with a tag.
    """

    _name = "VerificationSFT"
    CONFIG = VerificationSFTConfig
    METHOD = "reverse"
    COLUMNS: ClassVar = {
        "verdict_accuracy": "verdicts right",
        "p_unconfident/on_confident": "P(UN) at CN",
        "p_unconfident/on_unconfident": "P(UN) at UN",
        "verdict_auc": "verdict AUC",
        "verifier_auc": "probe AUC",
    }

    def __init__(self, model, args=None, data_collator=None, train_dataset=None, *positional, **kwargs):
        if train_dataset is not None:
            check_tagged(train_dataset)
        super().__init__(model, args, data_collator, train_dataset, *positional, **kwargs)
        self.verification = VerificationIds(
            *require_verification_tokens(self.processing_class, "the processor")
        )
        self._verdicts = {mode: deque(maxlen=VERDICTS_KEPT) for mode in ("train", "eval")}
        if isinstance(self.model, PeftModel) and (
            frozen := frozen_rows(self.model, dataclasses.astuple(self.verification))
        ):
            logger.warning(
                "the rows of the verification tokens do not train in %s: new tokens stay as they were made.",
                ", ".join(frozen),
            )

    def check_model(self, processor, source, model) -> None:
        require_verification_tokens(processor, source, model)

    def adapter_settings(self, model, processor, peft_config):
        return with_token_rows(model, peft_config, require_verification_tokens(processor, "the processor"))

    def make_collator(self, processor, args: VerificationSFTConfig) -> VisionCollator:
        return build_collator(processor, args)

    def running_state(self) -> dict[str, Any]:
        return super().running_state() | {"verdicts": list(self._verdicts["train"])}

    def take_running_state(self, state: dict[str, Any]) -> None:
        super().take_running_state(state)
        self._verdicts["train"].extend(state["verdicts"])

    def watch(self, outputs: ForwardPass, batch: Mapping[str, torch.Tensor]) -> None:
        if not self.args.verdict_metrics:
            return
        head, ids = self.plain_model.get_output_embeddings(), self.verification.closing
        p, truth, right = unconfident_probabilities(
            outputs.log_probs,
            batch["labels"][:, 1:],
            outputs.hidden[:, :-1],
            output_rows(head, ids),
            ids,
            self.model.config.get_text_config(),
        )
        self.record_means(
            ("verdict_accuracy", "p_unconfident/on_confident", "p_unconfident/on_unconfident"),
            torch.stack([right.sum(), p[~truth].sum(), p[truth].sum()]),
            torch.stack([truth.new_tensor(len(truth), dtype=torch.long), (~truth).sum(), truth.sum()]),
        )
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            self._verdicts["eval"].clear()  # each evaluation starts anew
        verdicts = self._verdicts[mode]
        # NaN stops the step soon, and is no score
        verdicts.extend(pair for pair in zip(p.tolist(), truth.tolist(), strict=True) if pair[0] == pair[0])
        if verdicts and not math.isnan(area := roc_auc(*zip(*verdicts, strict=True))):
            self._metrics[mode]["verdict_auc"].append(area)


def build_collator(processor, args: VerificationSFTConfig, **kwargs) -> VisionCollator:
    """The collator of verification training: mask inside of hallucinated phrases, weight on closing tags, hints.

    Args:
        kwargs: `image_root`, `rejects_path`, … for `VisionCollator`.
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
