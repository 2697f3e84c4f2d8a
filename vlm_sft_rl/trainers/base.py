"""`RowSFTTrainer`: TRL's SFT trainer on raw rows, with a weight per token. What is taught is in the collator."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments
from trl import SFTConfig, SFTTrainer

from ..data.chat import get_tokenizer, load_processor
from ..errors import UserError
from ..models.load import restore_weights
from ..models.lora import finish_peft
from ..models.parts import capture_outputs, parameter_groups, unwrap
from ..models.sidecar import Sidecar, read_sidecar, write_sidecar
from ..models.tokens import row_count
from ..packing.trainer import PackingMixin, PackingSettings, check_packing_settings
from .checks import (
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
from .skipping import SkippedRows

# The precision that our training arguments choose where nobody says one.
_LAUNCHER = "ACCELERATE_MIXED_PRECISION"


def choose_bf16(args: TrainingArguments) -> None:
    """Settle `bf16` and `fp16`, so that they alone say what a run computes in. Called before the arguments' own
    `__post_init__`, which takes the launcher's precision wherever both are off.

    Where `bf16` is None and `fp16` off: float16 if the launcher's config asks for it, else bfloat16 on a GPU that has it,
    else neither. `bf16: false` means it: no launcher's precision comes back. Where neither is on, the launcher's word, an
    environment variable, is "no" from then on.
    """
    launched_with = os.environ.get(_LAUNCHER)
    on_gpu = not args.use_cpu and torch.cuda.is_available()
    if args.bf16 is None:
        args.fp16 = args.fp16 or (on_gpu and launched_with == "fp16")
        args.bf16 = on_gpu and not args.fp16 and torch.cuda.is_bf16_supported()
    if not args.bf16 and not args.fp16 and launched_with in ("bf16", "fp16"):
        os.environ[_LAUNCHER] = "no"


# Settings that all SFT trainers on raw rows share.
@dataclass
class RowSFTConfig(PackingSettings, SFTConfig):
    """TRL's `SFTConfig` with defaults that are safe for images.

    Different from TRL: `max_length` None (TRL's 1024 cuts targets off behind the image tokens without a word; here a
    limit makes longer rows an error), `remove_unused_columns` False, `bf16` only where a GPU has it.
    """

    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest row in tokens, images included. A longer row is an error, never cut. None: no limit."
        },
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Must stay false: the collator reads the raw columns."}
    )
    projector_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the projector. None: the same as `learning_rate`."},
    )

    def __post_init__(self):
        choose_bf16(self)
        super().__post_init__()


# What every trainer's checkpoints have in common: the sidecar, and weights that really come back on resume.
class CheckpointMixin:
    """Write the sidecar into every checkpoint; read plain checkpoints back through transformers' own loader.

    To be named before a TRL trainer among the bases. `sidecar` is what is written; set it at any time.

    transformers saves LLaVA-like models under their published names (`language_model.model…`) but its Trainer resumes
    by the names in memory (`model.language_model…`) and only warns when none fits, so that a resumed run would go on
    from the base model. And it looks for the end of training only behind a step: a run that was killed between its last
    checkpoint and the end, inside of an epoch, would be resumed with one step too many.
    """

    sidecar: Sidecar = Sidecar()

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        write_sidecar(output_dir or self.args.output_dir, self.sidecar)

    def _run_epoch(self, *args, **kwargs) -> None:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if not self._restore(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is None or not self._restore(best):
            super()._load_best_model()

    def _restore(self, directory: str) -> bool:
        """Load a whole checkpoint into the model; False when adapters, FSDP or DeepSpeed have their own way."""
        plain = isinstance(self.model, PreTrainedModel) and not isinstance(self.model, PeftModel)
        if not plain or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        if not (Path(directory) / "config.json").is_file():
            raise UserError(f"{directory}: no config.json, so this is not a checkpoint of a whole model.")
        restore_weights(self.model, directory)
        return True


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
        with capture_outputs(model) as forwards:
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
