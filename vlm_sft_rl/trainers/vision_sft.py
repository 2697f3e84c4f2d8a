"""`VisionSFTTrainer`: supervised fine-tuning of vision-language models on mixtures of kinds of rows."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from trl import SFTConfig, SFTTrainer

from ..data.marks import verification_marks
from ..data.row_kinds import OTHER, ROW_KINDS, KindCollator, kind_marks
from ..errors import UserError
from ..models.freeze import parameter_groups
from ..models.load import load_processor
from ..models.peft import finish_peft
from ..models.sidecar import Sidecar, read_sidecar
from ..models.tokens import get_tokenizer
from .guards import check_arguments, check_batch, check_first_rows, check_processor, warn_of_low_precision
from .losses import weighted_nll
from .saving import CheckpointMixin
from .verification_sft import recorded


@dataclass
class VisionSFTConfig(SFTConfig):
    """TRL's `SFTConfig` with defaults that are safe for images: no truncation, raw rows reach the collator, `bf16` only
    where a GPU has it."""

    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest row in tokens, images included. A longer row is an error, never cut. None: no limit."
        },
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Must stay false: the collator reads the raw columns."}
    )
    kind_weights: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Factor on the loss of each kind of row, for example {select: 2.0}. Kinds: "
            f"{', '.join(ROW_KINDS)}. None: 1 for all, as published."
        },
    )
    projector_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the projector. None: the same as `learning_rate`."},
    )

    def __post_init__(self):
        if self.bf16 is None and not self.fp16:
            self.bf16 = not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        super().__post_init__()


class VisionSFTTrainer(CheckpointMixin, SFTTrainer):
    """TRL's SFT trainer on raw rows (`messages` + `images`, see `vlm_sft_rl.data.rows`).

    Same constructor as `trl.SFTTrainer`. Without a `data_collator` a `KindCollator` is made. `loss_weights` of a batch
    weigh each token's loss; with every weight 1 the loss is stock TRL's to the last bit on a CPU. The sum is divided by
    the number of supervised tokens, whatever their weights.

    Logged besides TRL's metrics: `loss/KIND`, the mean negative log-likelihood per token of each kind of row.

    Raises:
        UserError: settings that would go wrong in silence, or rows that teach nothing; before step 1.
    """

    _tag_names = ["trl", "sft", "vlm-sft-rl"]  # noqa: RUF012 - a list, as in TRL
    _name = "VisionSFT"

    def __init__(
        self,
        model,
        args: VisionSFTConfig | None = None,
        data_collator=None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset=None,
        processing_class=None,
        *positional,
        **kwargs,
    ):
        source = model if isinstance(model, str) else model.config._name_or_path
        args = args or VisionSFTConfig(f"{Path(source).name or 'model'}-VisionSFT")
        if not isinstance(args, VisionSFTConfig):
            raise UserError(f"`args` must be a VisionSFTConfig, not a {type(args).__name__}.")
        check_arguments(args)
        if train_dataset is None:
            raise UserError("`train_dataset` is missing.")
        processor = processing_class if processing_class is not None else load_processor(source)
        check_processor(processor)
        tokenizer = get_tokenizer(processor)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        if data_collator is None:
            data_collator = build_kind_collator(processor, args)
        # rows are rendered in the collator; without this TRL would tokenise rows that have no image column
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        self.sidecar = read_sidecar(source) or Sidecar()
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processor, *positional, **kwargs
        )
        if isinstance(self.model, PeftModel):
            finish_peft(self.model, upcast=args.deepspeed_plugin is None)
        warn_of_low_precision(self)
        weight = self._plain_model.get_input_embeddings().weight
        rows = getattr(weight, "ds_shape", weight.shape)[0]
        check_first_rows(self.train_dataset, self.data_collator, rows)

    @property
    def _plain_model(self):
        """The transformers model under PEFT."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        check_batch(inputs)
        weights, kinds = inputs.pop("loss_weights", None), inputs.pop("row_kind", None)
        with recorded(model) as forwards:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = forwards[0]
        if weights is not None:
            # see VerificationSFTTrainer: with all weights 1 this adds a zero with a zero gradient
            loss = result[0] if return_outputs else result
            count = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
            difference = weighted_nll(outputs.log_probs, weights[:, 1:].to(outputs.log_probs) - 1, count)
            if self.args.average_tokens_across_devices and num_items_in_batch is not None:
                difference = difference * (self.accelerator.num_processes // self.get_tp_size())
            loss = loss + difference
            if model.training and not loss.requires_grad:
                # a batch without images gives the projector nothing to learn; its gradient is zero, not an error
                loss = loss + 0.0 * sum(p.sum() for p in model.parameters() if p.requires_grad)
            result = (loss, result[1]) if return_outputs else loss
        if kinds is not None:
            self._log_kinds(outputs.log_probs.detach(), outputs.label_mask, kinds)
        return result

    def _log_kinds(self, log_probs: torch.Tensor, mask: torch.Tensor, kinds: torch.Tensor) -> None:
        """Add each kind's mean loss of one batch; every rank takes part, whatever kinds it has."""
        names = (*ROW_KINDS, OTHER)
        rows = torch.nn.functional.one_hot(kinds.to(log_probs.device), len(names)).double()  # (batch, kinds)
        sums = torch.stack([rows.T @ -log_probs.sum(1).double(), rows.T @ mask.sum(1).double()])
        losses, tokens = self.accelerator.reduce(sums, "sum").tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, loss, count in zip(names, losses, tokens, strict=True):
            if count:
                metrics[f"loss/{name}"].append(loss / count)

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.args.projector_learning_rate is not None:
            model = args[0] if args else kwargs.get("model") or self.model
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            groups = parameter_groups(optimizer.param_groups, names, self.args.projector_learning_rate)
            optimizer.param_groups = list(groups)
        return optimizer


def build_kind_collator(processor, args: VisionSFTConfig, **kwargs) -> KindCollator:
    """The collator of a mixture: loss on the answers, weighted by kind; tagged rows keep their verification mask.

    Args:
        kwargs: `image_root`, `on_bad_row`, `rejects_path`, … for `VisionCollator`.
    """
    return KindCollator(
        processor,
        marks=[*verification_marks(get_tokenizer(processor)), *kind_marks(args.kind_weights)],
        max_length=args.max_length,
        seed=args.seed if args.data_seed is None else args.data_seed,
        pad_to_multiple_of=args.pad_to_multiple_of,
        **kwargs,
    )
