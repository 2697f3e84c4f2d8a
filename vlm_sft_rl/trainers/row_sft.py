"""`RowSFTTrainer`: TRL's SFT trainer on raw rows, with a weight per token. What is taught is in the collator."""

from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftModel
from trl import SFTTrainer

from ..errors import UserError
from ..models.freeze import parameter_groups
from ..models.load import load_processor
from ..models.peft import finish_peft
from ..models.sidecar import Sidecar, read_sidecar
from ..models.tokens import get_tokenizer, row_count
from ..models.unwrap import unwrap
from .guards import (
    check_arguments,
    check_batch,
    check_first_rows,
    check_mixture,
    check_precision,
    check_processor,
    check_sharding,
    check_trains,
    may_hold_float32,
)
from .losses import weighted_nll
from .packing import PackingMixin, check_packing_settings
from .recording import recorded
from .row_sft_config import RowSFTConfig
from .saving import CheckpointMixin
from .skipping import SkippedRows


class RowSFTTrainer(CheckpointMixin, PackingMixin, SFTTrainer):
    """TRL's SFT trainer on raw rows (`messages` + `images`, see `vlm_sft_rl.data.rows`); the base of our SFT trainers.

    Same constructor as `trl.SFTTrainer`. A collator's `loss_weights` weigh each token's loss. With every weight 1 the loss
    is stock TRL's to the last bit on a CPU. The sum is divided by the number of supervised tokens, whatever their
    weights.

    A subclass names its `CONFIG`, makes its collator (`make_collator`) and may look at the model before the first step
    (`check_model`). With a collator that skips bad rows `skipped_rows` is logged, of all processes since the run began.

    Raises:
        UserError: settings that would go wrong in silence, or rows that teach nothing; before step 1.
    """

    _tag_names = ["trl", "sft", "vlm-sft-rl"]  # noqa: RUF012 - a list, as in TRL
    _name = "RowSFT"
    CONFIG: type[RowSFTConfig] = RowSFTConfig

    def __init__(
        self,
        model,
        args: RowSFTConfig | None = None,
        data_collator=None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset=None,
        processing_class=None,
        *positional,
        **kwargs,
    ):
        source = model if isinstance(model, str) else model.config._name_or_path
        args = args or self.CONFIG(f"{Path(source).name or 'model'}-{self._name}")
        if not isinstance(args, self.CONFIG):
            raise UserError(f"`args` must be a {self.CONFIG.__name__}, not a {type(args).__name__}.")
        check_arguments(args)
        check_packing_settings(args)
        if train_dataset is None:
            raise UserError("`train_dataset` is missing.")
        processor = processing_class if processing_class is not None else load_processor(source)
        check_processor(processor)
        self.check_model(processor, source, None if isinstance(model, str) else model)
        tokenizer = get_tokenizer(processor)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        if data_collator is None:
            data_collator = self.make_collator(processor, args)
        # rows are rendered in the collator; without this TRL would tokenise rows that have no image column
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        self.sidecar = read_sidecar(source) or Sidecar()
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processor, *positional, **kwargs
        )
        self.check_model(processor, source, self._plain_model)
        if isinstance(self.model, PeftModel):
            finish_peft(self.model, upcast=may_hold_float32(self.model, args))
        check_sharding(self)
        check_trains(self.model)
        check_precision(self)
        rows = row_count(self._plain_model.get_input_embeddings().weight)
        check_first_rows(self.train_dataset, self.data_collator, rows)
        check_mixture(self.train_dataset, self.data_collator, args.per_device_train_batch_size)
        if getattr(self.data_collator, "rejects", None) is not None:
            self.add_callback(SkippedRows(self.data_collator.rejects, self.record))
        self.start_packing()

    def check_model(self, processor, source: str, model) -> None:
        """Called with the processor alone (`model` None) when the model is still a path, and with the loaded model.

        Raises:
            UserError: the method needs something that they lack.
        """

    def make_collator(self, processor, args: RowSFTConfig) -> Any:
        """The collator of this method, for images whose paths start from the current folder."""
        raise UserError(f"{type(self).__name__}: give a `data_collator`.")

    @property
    def _plain_model(self):
        """The transformers model under PEFT."""
        return unwrap(self.model)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        check_batch(inputs)
        weights = inputs.pop("loss_weights", None)
        with recorded(model) as forwards:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if weights is None:
            return result
        # TRL's loss has weight 1 on every label; add what the others differ by. With all weights 1 that is a
        # zero with a zero gradient, so nothing of TRL's own loss changes
        outputs, loss = forwards[0], result[0] if return_outputs else result
        count = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
        difference = weighted_nll(outputs.log_probs, weights[:, 1:].to(outputs.log_probs) - 1, count)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # as in TRL's own loss: ranks of one tensor-parallel group see the same rows
            difference = difference * (self.accelerator.num_processes // self.get_tp_size())
        loss = loss + difference
        if model.training and not loss.requires_grad:
            # a batch without images gives the projector nothing to learn; its gradient is zero, not an error
            loss = loss + 0.0 * sum(p.sum() for p in model.parameters() if p.requires_grad)
        return (loss, result[1]) if return_outputs else loss

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


def collator_settings(args: RowSFTConfig) -> dict[str, Any]:
    """What a trainer's settings say about any `VisionCollator`."""
    return {
        "max_length": args.max_length,
        "seed": args.seed if args.data_seed is None else args.data_seed,
        "pad_to_multiple_of": args.pad_to_multiple_of,
        "always_image": args.world_size > 1,
    }
