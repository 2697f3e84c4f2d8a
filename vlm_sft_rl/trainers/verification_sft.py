"""`VerificationSFTTrainer`: TRL's SFT trainer with a weight per token, for REVERSE (arXiv 2504.13169, section 3.2).

What is taught is in the collator (labels and weights); this file only weighs TRL's loss and watches the verdicts.
"""

import math
from collections import deque
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from peft.utils.other import TrainableTokensWrapper
from torch.distributed.tensor import DTensor
from trl import SFTTrainer
from trl.trainer.utils import maybe_gather_lm_head_ctx

from ..data.collators import VisionCollator
from ..data.marks import VerificationIds, closing_weight_mark, verification_mark
from ..data.packed_collator import PackedCollator
from ..errors import UserError
from ..models.freeze import parameter_groups
from ..models.load import load_processor
from ..models.peft import finish_peft
from ..models.sidecar import Sidecar, read_sidecar
from ..models.tokens import get_tokenizer, require_verification_tokens
from ..roc import roc_auc
from .guards import (
    check_arguments,
    check_batch,
    check_first_rows,
    check_mixture,
    check_processor,
    check_sharding,
    warn_of_low_precision,
)
from .losses import unconfident_probabilities, weighted_nll
from .packing import PackingMixin, check_packing_settings
from .recording import recorded
from .saving import CheckpointMixin
from .skipping import SkippedRows
from .verification_config import VerificationSFTConfig

VERDICTS_KEPT = 2000


class VerificationSFTTrainer(CheckpointMixin, PackingMixin, SFTTrainer):
    """Supervised fine-tuning on answers whose phrases carry verification tags.

    Same constructor as `trl.SFTTrainer`. The differences: `args` is a `VerificationSFTConfig`; without a
    `data_collator` a `VisionCollator` with the verification mark is made, so `train_dataset` holds raw rows
    (`messages` + `images`, see `vlm_sft_rl.data.rows`); a collator's `loss_weights` weigh each token's loss.

    With every weight 1 the loss is stock TRL's to the last bit on a CPU. The sum is divided by the number of supervised
    tokens, whatever their weights, as the published loss is.

    Logged besides TRL's metrics: `verdict_accuracy` (is the likelier of the two closing tags the right one),
    `p_unconfident/on_confident`, `p_unconfident/on_unconfident` (mean P(`</UN>`) at closing tags of each kind) and
    `verdict_auc` (ROC area of P(`</UN>`) over the last 2000 closing tags this process saw). With a collator that skips
    bad rows also `skipped_rows`, of all processes since the run began.

    Raises:
        UserError: settings that would go wrong in silence, missing tokens, rows that teach nothing; before step 1.
    """

    _tag_names = ["trl", "sft", "vlm-sft-rl"]  # noqa: RUF012 - a list, as in TRL
    _name = "VerificationSFT"

    def __init__(
        self,
        model,
        args: VerificationSFTConfig | None = None,
        data_collator=None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset=None,
        processing_class=None,
        *positional,
        **kwargs,
    ):
        source = model if isinstance(model, str) else model.config._name_or_path
        args = args or VerificationSFTConfig(f"{Path(source).name or 'model'}-VerificationSFT")
        if not isinstance(args, VerificationSFTConfig):
            raise UserError(f"`args` must be a VerificationSFTConfig, not a {type(args).__name__}.")
        check_arguments(args)
        check_packing_settings(args)
        if train_dataset is None:
            raise UserError("`train_dataset` is missing.")
        processor = processing_class if processing_class is not None else load_processor(source)
        check_processor(processor)
        self.verification = VerificationIds(
            *require_verification_tokens(processor, source, None if isinstance(model, str) else model)
        )
        tokenizer = get_tokenizer(processor)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        if data_collator is None:
            data_collator = build_collator(processor, args)
        # rows are rendered in the collator; without this TRL would tokenise rows that have no image column
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        self.sidecar = read_sidecar(source) or Sidecar()
        self._verdicts = {mode: deque(maxlen=VERDICTS_KEPT) for mode in ("train", "eval")}
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processor, *positional, **kwargs
        )
        require_verification_tokens(processor, source, self._plain_model)
        if isinstance(self.model, PeftModel):
            finish_peft(self.model, upcast=args.deepspeed_plugin is None)
        check_sharding(self)
        warn_of_low_precision(self)
        weight = self._plain_model.get_input_embeddings().weight
        rows = getattr(weight, "ds_shape", weight.shape)[0]
        check_first_rows(self.train_dataset, self.data_collator, rows)
        check_mixture(self.train_dataset, self.data_collator, args.per_device_train_batch_size)
        if getattr(self.data_collator, "rejects", None) is not None:
            self.add_callback(SkippedRows(self.data_collator.rejects, self.record))
        self.start_packing()

    @property
    def _plain_model(self):
        """The transformers model under PEFT."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        check_batch(inputs)
        weights = inputs.pop("loss_weights", None)
        watch = recorded(self._plain_model.base_model) if self.args.verdict_metrics else nullcontext()
        with recorded(model) as forwards, watch as backbone:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = forwards[0]
        if weights is not None:
            # TRL's loss has weight 1 on every label; add what the others differ by. With all weights 1 that is a
            # zero with a zero gradient, so nothing of TRL's own loss changes
            loss = result[0] if return_outputs else result
            count = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
            difference = weighted_nll(outputs.log_probs, weights[:, 1:].to(outputs.log_probs) - 1, count)
            if self.args.average_tokens_across_devices and num_items_in_batch is not None:
                # as in TRL's own loss: ranks of one tensor-parallel group see the same rows
                difference = difference * (self.accelerator.num_processes // self.get_tp_size())
            loss = loss + difference
            if model.training and not loss.requires_grad:
                # a batch without images gives the projector nothing to learn; its gradient is zero, not an error
                loss = loss + 0.0 * sum(p.sum() for p in model.parameters() if p.requires_grad)
            result = (loss, result[1]) if return_outputs else loss
        if backbone is not None:
            self._watch_verdicts(outputs.log_probs, inputs["labels"][:, 1:], backbone[0].last_hidden_state)
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

    def record(self, figures: dict[str, float]) -> None:
        """Let a callback's figures join the current step's log record (`trainer.log` there would swallow it)."""
        for name, value in figures.items():
            self._metrics["train"][name].append(value)

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.args.projector_learning_rate is not None:
            model = args[0] if args else kwargs.get("model") or self.model
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            groups = parameter_groups(optimizer.param_groups, names, self.args.projector_learning_rate)
            optimizer.param_groups = list(groups)
        return optimizer


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
        max_length=args.max_length,
        hint_probability=args.hint_probability,
        seed=args.seed if args.data_seed is None else args.data_seed,
        pad_to_multiple_of=args.pad_to_multiple_of,
        always_image=args.world_size > 1,
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
