"""`ReflectionDPOTrainer`: TRL's DPO trainer on right and wrong rationales of a self-training pool."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel
from trl import DPOConfig, DPOTrainer

from ..data.chat import get_tokenizer, load_processor
from ..data.collators import PreferenceCollator
from ..data.rows import PAIR_KINDS
from ..errors import UserError
from ..models.load import is_adapter
from ..models.lora import finish_peft
from ..models.parts import capture_outputs
from ..models.sidecar import Sidecar, read_sidecar
from .base import CheckpointMixin, choose_bf16
from .checks import check_precision, check_processor, check_reference, check_trains, may_hold_float32

WEIGHTED_LOSSES = ("sigmoid", "hinge")


@dataclass
class ReflectionDPOConfig(DPOConfig):
    """TRL's `DPOConfig` with defaults that are safe for images: no truncation, raw rows reach the collator, `bf16` only
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

    def __post_init__(self):
        choose_bf16(self)
        super().__post_init__()


class ReflectionDPOTrainer(CheckpointMixin, DPOTrainer):
    """DPO on rows of TRL's conversational preference format with images, plus `pair_kind` and `pair_weight`.

    Same constructor as `trl.DPOTrainer`. Without pair weights (or with all of them 1) the loss is stock TRL's to the last
    bit; otherwise each pair's sigmoid or hinge loss is multiplied by its weight and the sum divided by the number of
    pairs. Other terms (`sft`) are not weighted.

    Logged besides TRL's metrics: `rewards/margins_KIND` and `rewards/accuracies_KIND` for each kind of pair.

    Raises:
        UserError: settings that would go wrong in silence: an adapter as the model (its reference would be trained from
            the wrong weights), a model whose reference on the disk has another vocabulary, weights with a loss that they
            are not defined for.
    """

    _tag_names = ["trl", "dpo", "vlm-sft-rl"]  # noqa: RUF012 - a list, as in TRL
    _name = "ReflectionDPO"

    def __init__(
        self,
        model,
        ref_model=None,
        args: ReflectionDPOConfig | None = None,
        data_collator=None,
        train_dataset: Dataset | None = None,
        eval_dataset=None,
        processing_class=None,
        *positional,
        **kwargs,
    ):
        source = model if isinstance(model, str) else model.config._name_or_path
        args = args or ReflectionDPOConfig(f"{Path(source).name or 'model'}-ReflectionDPO")
        if not isinstance(args, ReflectionDPOConfig):
            raise UserError(f"`args` must be a ReflectionDPOConfig, not a {type(args).__name__}.")
        if train_dataset is None:
            raise UserError("`train_dataset` is missing.")
        _check(args, model, ref_model, source, train_dataset, kwargs.get("peft_config"))
        processor = processing_class if processing_class is not None else load_processor(source)
        check_processor(processor)
        tokenizer = get_tokenizer(processor)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        if data_collator is None:
            data_collator = PreferenceCollator(processor, max_length=args.max_length)
        self.sidecar = read_sidecar(source) or Sidecar()
        super().__init__(
            model,
            ref_model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processor,
            *positional,
            **kwargs,
        )
        if isinstance(self.model, PeftModel):
            finish_peft(self.model, upcast=may_hold_float32(self.model, args))
        check_trains(self.model)
        check_precision(self)
        data_collator(list(train_dataset.select(range(1))))  # a row that cannot be used fails now

    def _compute_loss(self, model, inputs, return_outputs):
        weights, kinds = inputs.pop("pair_weight", None), inputs.pop("pair_kind", None)
        # under DDP and DeepSpeed the policy's pass goes through the wrapper, the pass with adapters off does not
        unwrapped = self.accelerator.unwrap_model(model)
        reference = self.ref_model if self.ref_model is not None else unwrapped
        with capture_outputs(unwrapped) as own, capture_outputs(reference) as theirs:
            result = super()._compute_loss(model, inputs, return_outputs)
        # with adapters one model runs twice: first as the policy, then, adapters off, as the reference
        both = own[:2] if reference is unwrapped else [own[0], theirs[0]]
        policy, anchor = (self._sums(outputs, inputs["completion_mask"]) for outputs in both)
        margin = (policy - anchor).chunk(2)
        margin = self.beta * (margin[0] - margin[1])
        if kinds is not None:
            self._log_kinds(margin.detach(), kinds)
        if weights is None or bool((weights == 1).all()):
            return result
        loss = result[0] if return_outputs else result
        loss = loss + ((weights.to(margin) - 1) * self._pair_losses(margin)).mean()
        return (loss, result[1]) if return_outputs else loss

    def _sums(self, outputs, completion_mask: torch.Tensor) -> torch.Tensor:
        """Log-probability of each completion, (2 * pairs,)."""
        return outputs.log_probs[:, -(completion_mask.shape[1] - 1) :].sum(1)

    def _pair_losses(self, margin: torch.Tensor) -> torch.Tensor:
        """The weighted part of TRL's loss, a number a pair."""
        total = torch.zeros_like(margin)
        for name, weight in zip(self.loss_types, self.loss_weights, strict=True):
            if name == "sigmoid":
                total = total - weight * F.logsigmoid(margin)
            elif name == "hinge":
                total = total + weight * torch.relu(1 - margin)
        return total

    def _log_kinds(self, margin: torch.Tensor, kinds: torch.Tensor) -> None:
        """Margins and accuracies of each kind of pair; every rank takes part, whatever kinds it has."""
        rows = F.one_hot(kinds.to(margin.device), len(PAIR_KINDS)).double()
        sums = torch.stack([rows.sum(0), rows.T @ margin.double(), rows.T @ (margin > 0).double()])
        counts, margins, right = self.accelerator.reduce(sums, "sum").tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, count, value, correct in zip(PAIR_KINDS, counts, margins, right, strict=True):
            if count:
                metrics[f"rewards/margins_{name}"].append(value / count)
                metrics[f"rewards/accuracies_{name}"].append(correct / count)


def _check(args, model, ref_model, source: str, dataset: Dataset, peft_config) -> None:
    if args.remove_unused_columns:
        raise UserError(
            "`remove_unused_columns`: it would take away the columns that the collator reads; set it to false."
        )
    if args.precompute_ref_log_probs:
        raise UserError("`precompute_ref_log_probs` does not work with images; set it to false.")
    if isinstance(model, PeftModel) or (isinstance(model, str) and is_adapter(model)):
        raise UserError(
            f"{source}: an adapter cannot be the start of DPO: TRL would put a copy of it beside it as the reference. Merge "
            f"it first: `vlm-sft-rl merge {source} MERGED`."
        )
    if not isinstance(model, str) and ref_model is None and peft_config is None:
        check_reference(model, source, "DPO")
    weighted = "pair_weight" in dataset.column_names and any(w != 1 for w in dataset["pair_weight"])
    if weighted and not set(args.loss_type) <= {*WEIGHTED_LOSSES, "sft"}:
        raise UserError(
            f"`pair_weight` is defined for the losses {', '.join(WEIGHTED_LOSSES)} (and `sft` beside them), not for "
            f"{args.loss_type}. Change `loss_type`, or make all weights 1."
        )
    plain = args.f_divergence_type == "reverse_kl" and args.ld_alpha is None and not args.use_weighting
    if weighted and not plain:
        raise UserError(
            "`pair_weight` goes with plain DPO only: remove `f_divergence_type`, `ld_alpha`, `use_weighting`."
        )
