"""What every trainer here shares, and `WeightedSFTTrainer`: TRL's SFT trainer on raw rows, with a weight per token."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, TrainerCallback
from trl import SFTConfig, SFTTrainer

from ..data.chat import get_tokenizer, load_processor
from ..data.marks import IGNORE, NO_DOUBT, verification_ids
from ..data.rejects import Rejects
from ..errors import UserError
from ..io import give_user_mode
from ..models.card import write_card
from ..models.load import check_adapter, load_model, restore_weights
from ..models.lora import finish_peft
from ..models.parts import capture_outputs, parameter_groups, unwrap
from ..models.sidecar import Sidecar, read_sidecar, with_base, write_sidecar
from ..models.tokens import is_tied, row_count
from ..models.versions import settle_checkpointing
from ..models.weights import ADAPTER
from ..packing.trainer import PackingMixin, PackingSettings, check_packing_settings
from ..settings import data_seed, setting
from .checks import (
    check_adapter_settings,
    check_arguments,
    check_doubts,
    check_engine,
    check_first_rows,
    check_loss_weights,
    check_mixture,
    check_precision,
    check_processor,
    check_sharding,
    check_trains,
    may_hold_float32,
    name_wrapped_layers,
)
from .finite import FiniteSteps
from .losses import next_token_log_probs, weighted_nll
from .resume import Resuming
from .table import show_steps

logger = logging.getLogger(__name__)


@dataclass
class OpenPrecision:
    """To be named first among a config's bases: what a run computes in is said by `bf16` and `fp16` alone, and a CPU that
    the launcher was told to use is used.

    `bf16: null` with `fp16` off is settled here: float16 if the launcher's config asks for it, else bfloat16 on a GPU that
    has it, else neither. Where both are off they mean it: the launcher's 16 bits do not come back.
    Settings that transformers has renamed are handed on to their new names here, too.
    """

    logging_nan_inf_filter: bool = setting(
        False,
        "A loss that is not finite stops the run before it is logged; filtering costs two waits for the GPU.",
    )

    def __post_init__(self):
        self.use_cpu = self.use_cpu or os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
        if self.bf16 is None:
            on_gpu = not self.use_cpu and torch.cuda.is_available()
            launched_in_fp16 = os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16"
            self.fp16 = self.fp16 or (on_gpu and launched_in_fp16)
            self.bf16 = on_gpu and not self.fp16 and torch.cuda.is_bf16_supported()
        settle_checkpointing(self)
        if self.max_grad_norm is None:
            self.max_grad_norm = 0.0
        if not self.max_grad_norm >= 0:
            raise UserError(
                f"`max_grad_norm` is {self.max_grad_norm}, expected a number >= 0 (0: nothing is clipped)."
            )
        super().__post_init__()
        # without an accelerator nothing is copied to one, and torch warns
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()

    @property
    def mixed_precision(self) -> str:
        """What transformers hands to accelerate and DeepSpeed."""
        if self.fp16 or self.bf16:
            return "fp16" if self.fp16 else "bf16"
        return "no" if self._launched_with in ("bf16", "fp16") else self._launched_with

    @mixed_precision.setter
    def mixed_precision(self, launched_with: str) -> None:
        # transformers takes the launcher's precision wherever the arguments leave both off
        self._launched_with = launched_with


@dataclass
class RawRowSettings(OpenPrecision):
    """To be named before a TRL config among the bases: settings of trainers whose collator reads raw rows.

    Different from TRL: `max_length` None (TRL's 1024 cuts targets off behind the image tokens without a word; here a
    limit makes longer rows an error), `remove_unused_columns` False, `bf16` only where a GPU has it.
    """

    max_length: int | None = setting(
        None, "Longest row in tokens, images included. A longer row is an error, never cut. None: no limit."
    )
    remove_unused_columns: bool | None = setting(
        False, "Must stay false: the collator reads the raw columns."
    )


class VisionTrainer(Resuming, FiniteSteps):
    """To be named before a TRL trainer among the bases: the way in and out of its constructor, and its checkpoints.

    A subclass names its `CONFIG`, the `METHOD` of its card where no recipe says it, and as `COLUMNS` what it logs of its own
    (see `table.StepTable`). `sidecar` is written into every checkpoint; set it at any time.
    """

    CONFIG: type
    METHOD = "sft"
    COLUMNS: Mapping[str, str] = MappingProxyType({})
    sidecar: Sidecar = Sidecar()

    def begin(self, model, args, processing_class) -> tuple[str, Any, Any]:
        """Before TRL's constructor: the model's folder, the settings and the processor, checked; the sidecar is read.

        Raises:
            UserError: settings of another trainer, a tokenizer in place of a processor, or nothing to load.
        """
        source = model if isinstance(model, str) else model.config._name_or_path
        args = args or self.CONFIG(f"{Path(source).name or 'model'}-{self._name}")
        if not isinstance(args, self.CONFIG):
            raise UserError(f"`args` must be a {self.CONFIG.__name__}, not a {type(args).__name__}.")
        processor = processing_class if processing_class is not None else load_processor(source)
        check_processor(processor)
        tokenizer = get_tokenizer(processor)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        self.sidecar = with_base(read_sidecar(source) or Sidecar(), source)
        return source, args, processor

    def finish_model(self) -> None:
        """Behind TRL's constructor: make adapters fit for training.

        Raises:
            UserError: nothing is trained, or in a precision that cannot be; settings of an adapter that do nothing; or the
                launcher was asked for another engine.
        """
        check_engine(self.accelerator.state)
        show_steps(self, self.COLUMNS)
        name_wrapped_layers(self)
        if isinstance(self.model, PeftModel):
            check_adapter_settings(self.model)
            finish_peft(self.model, upcast=may_hold_float32(self.model, self.args))
        check_trains(self.model)
        check_precision(self)

    def training_step(self, model, inputs, *args, **kwargs):
        # TRL reads the output embedding's weight and never calls it: FSDP2, which gathers a layer when it is called, would
        # leave its gradient with each process's own rows. (accelerate: `fsdp2_prepare_model`; TRL: `add_fused_lm_head`)
        head = self.plain_model.get_output_embeddings()
        if isinstance(head, FSDPModule) and head.weight.requires_grad:
            head.unshard()
        return super().training_step(model, inputs, *args, **kwargs)

    @property
    def plain_model(self) -> PreTrainedModel:
        """The transformers model under PEFT."""
        return unwrap(self.model)

    def record(self, figures: Mapping[str, float]) -> None:
        """Let a callback's figures join the current step's log record (`trainer.log` there would swallow it)."""
        for name, value in figures.items():
            self._metrics["train"][name].append(float(value))

    def record_means(self, names: Sequence[str], sums: torch.Tensor, counts: torch.Tensor) -> list[float]:
        """Log the mean of each name over all processes, where anything was counted; every process takes part.

        Args:
            sums, counts: (names,) of this process.

        Returns:
            The counts of all processes.
        """
        totals, counts = self.accelerator.reduce(torch.stack([sums, counts]).double(), "sum").tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, total, count in zip(names, totals, counts, strict=True):
            if count:
                metrics[name].append(total / count)
        return counts

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | Sequence[str] | None = None,
    ) -> None:
        """Write the card into the output folder, see `models.card`; the sidecar's recipe knows the data."""
        if self.is_world_process_zero():
            self._write_card(
                self.args.output_dir, model_name, [tags] if isinstance(tags, str) else tags or ()
            )

    def _write_card(self, folder: str | Path, name: str | None = None, tags: Sequence[str] = ()) -> None:
        name = self.args.hub_model_id or name or Path(self.args.output_dir).resolve().name
        columns = {metric: heading for metric, heading in self.COLUMNS.items() if heading}
        records = [record for record in self.state.log_history if "loss" in record]
        last = records[-1] if records else {}
        figures = {
            heading: last[metric] for metric, heading in {"loss": "loss", **columns}.items() if metric in last
        }
        write_card(
            folder,
            self.sidecar,
            name=name,
            method=self.METHOD,
            tags=[*self._tag_names, *tags],
            figures=figures,
        )

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        if state_dict is not None and isinstance(self.model, PreTrainedModel) and is_tied(self.model):
            # gathered from the processes, tied weights are copies that transformers does not recognise
            tied = self.model.all_tied_weights_keys
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)
        folder = output_dir or self.args.output_dir
        write_sidecar(folder, self.sidecar)
        self._write_card(folder)  # PEFT has written one that names the base by its folder
        give_user_mode(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if not self._restore(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _determine_best_metric(self, metrics, trial):
        try:
            return super()._determine_best_metric(metrics, trial)
        except KeyError as error:  # behind the first evaluation: what it measures is known by then
            raise UserError(str(error.args[0])) from error

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is None or not self._restore(best):
            super()._load_best_model()

    def _restore(self, directory: str) -> bool:
        """Load a whole checkpoint into the model; False where adapters, FSDP or DeepSpeed have their own way.

        transformers saves LLaVA-like models under their published names (`language_model.model…`) but its Trainer resumes
        by the names in memory (`model.language_model…`) and only warns when none fits, so that a resumed run would go on
        from the base model. PEFT, too, only warns of weights that an adapter lacks.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        if isinstance(self.model, PeftModel):
            if not (Path(directory) / ADAPTER).is_file():
                raise UserError(f"{directory}: no {ADAPTER}, so this is not a checkpoint of an adapter.")
            check_adapter(self.model, directory, f"{directory}: the adapter is not of this run's kind")
            return False
        if not isinstance(self.model, PreTrainedModel):
            return False
        if not (Path(directory) / "config.json").is_file():
            raise UserError(f"{directory}: no config.json, so this is not a checkpoint of a whole model.")
        restore_weights(self.model, directory)
        return True


def loaded(model, args, options: dict[str, Any]) -> PreTrainedModel:
    """The model of a path, loaded as TRL would, with every weight accounted for; a model as it is.

    Args:
        options: of TRL's constructor; `quantization_config` is used up.
    """
    if not isinstance(model, str):
        return model
    settings = {"dtype": "float32", **(args.model_init_kwargs or {})}
    if settings.pop("trust_remote_code", False) or getattr(args, "trust_remote_code", False):
        raise UserError("`trust_remote_code`: code from a checkpoint is never run here; remove it.")
    settings["quantization_config"] = options.pop("quantization_config", settings.get("quantization_config"))
    state = args.distributed_state
    if state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        settings["device_map"] = None
    elif state.device.type not in ("cpu", "mps"):
        settings.setdefault("device_map", "auto")
    return load_model(model, **settings)


@dataclass
class WeightedSFTConfig(RawRowSettings, PackingSettings, SFTConfig):
    """TRL's `SFTConfig` with defaults that are safe for images, see `RawRowSettings`."""

    projector_learning_rate: float | None = setting(
        None, "Learning rate of the projector. None: the same as `learning_rate`."
    )


@dataclass(frozen=True)
class ForwardPass:
    """What one pass of training or evaluation computed.

    Attributes:
        log_probs: (batch, length - 1) of each next token, 0 where there is no label.
        label_mask: the same shape, True where there is one.
        hidden: (batch, length, width), what the output embedding reads.
    """

    log_probs: torch.Tensor
    label_mask: torch.Tensor
    hidden: torch.Tensor


class WeightedSFTTrainer(VisionTrainer, PackingMixin, SFTTrainer):
    """TRL's SFT trainer on raw rows (`messages` + `images`, see `vlm_sft_rl.data.rows`); the base of our SFT trainers.

    Same constructor as `trl.SFTTrainer`. A collator's `loss_weights` weigh each token's loss; at a closing tag
    with a doubt d it is the cross-entropy against P(`</CN>`) = 1 - d and P(`</UN>`) = d. The sum is divided by
    the number of supervised tokens of a step, whatever their weights. With every weight 1 the loss is stock TRL's to
    the last bit on a CPU; for families that refuse transformers' `num_items_in_batch` (Qwen2.5-VL, Qwen3-VL) in steps
    of one micro-batch on one process, because stock TRL averages the means of several.

    A subclass names its `CONFIG`, makes its collator (`make_collator`), may look at the model before the first step
    (`check_model`) and at every pass (`watch`). With a collator that skips bad rows `skipped_rows` is logged, of all
    processes since the run began.

    Raises:
        UserError: settings that would go wrong in silence, or rows that teach nothing; before step 1.
    """

    _tag_names = ["trl", "sft", "vlm-sft-rl"]  # noqa: RUF012 - a list, as in TRL
    _name = "WeightedSFT"
    CONFIG = WeightedSFTConfig
    # tensors of a batch that are for `watch` and not for the model
    EXTRA_TENSORS: tuple[str, ...] = ()

    def __init__(
        self,
        model,
        args: WeightedSFTConfig | None = None,
        data_collator=None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset=None,
        processing_class=None,
        *positional,
        **kwargs,
    ):
        source, args, processor = self.begin(model, args, processing_class)
        check_arguments(args)
        check_packing_settings(args)
        if train_dataset is None:
            raise UserError("`train_dataset` is missing.")
        self.check_model(processor, source, None if isinstance(model, str) else model)
        model = loaded(model, args, kwargs)
        args.model_init_kwargs = None
        if kwargs.get("peft_config") is not None:
            kwargs["peft_config"] = self.adapter_settings(model, processor, kwargs["peft_config"])
        if data_collator is None:
            data_collator = self.make_collator(processor, args)
        # rows are rendered in the collator; without this TRL would tokenise rows that have no image column
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        check_sharding(args, model, kwargs.get("peft_config"))
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processor, *positional, **kwargs
        )
        # TRL's fused head divides by the tokens of a whole step, as `compute_loss` does; transformers would average the
        # micro-batches' and processes' means for families whose own forward cannot (Qwen2.5-VL, Qwen3-VL)
        self.model_accepts_loss_kwargs = True
        self.check_model(processor, source, self.plain_model)
        self.finish_model()
        rows = row_count(self.plain_model.get_input_embeddings().weight)
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

    def adapter_settings(self, model, processor, peft_config):
        """What the method needs of `peft_config` beside what the user wrote."""
        return peft_config

    def make_collator(self, processor, args: WeightedSFTConfig) -> Any:
        """The collator of this method, for images whose paths start from the current folder."""
        raise UserError(f"{type(self).__name__}: give a `data_collator`.")

    def watch(self, outputs: ForwardPass, batch: Mapping[str, torch.Tensor]) -> None:
        """Called behind every pass, without gradient: log what the method tells of itself (`record_means`).

        Every process comes here for each of its batches, so sums may be exchanged.
        """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        weights, doubts = inputs.pop("loss_weights", None), inputs.pop("doubts", None)
        check_loss_weights(weights, inputs.get("labels"))
        extra = {name: inputs.pop(name) for name in self.EXTRA_TENSORS if name in inputs}
        with capture_outputs(model) as passes, capture_outputs(self.plain_model.base_model) as backbone:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs, hidden = passes[0], backbone[0].last_hidden_state
        gain = None if doubts is None else self._doubted(outputs.log_probs, hidden, doubts)
        with torch.no_grad():
            batch = {**inputs, **extra}
            if doubts is not None:  # these tags are no verdicts that could be right or wrong
                batch["labels"] = batch["labels"].masked_fill(doubts != NO_DOUBT, IGNORE)
            self.watch(ForwardPass(outputs.log_probs, outputs.label_mask, hidden), batch)
        if weights is None:
            return result
        # TRL's loss has weight 1 on every label; add what the others differ by. With all weights 1 that is a
        # zero with a zero gradient, so nothing of TRL's own loss changes
        loss = result[0] if return_outputs else result
        count = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
        weights = weights[:, 1:].to(outputs.log_probs)
        difference = weighted_nll(outputs.log_probs, weights - 1, count)
        if gain is not None:
            difference = difference + weighted_nll(gain, weights, count)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # as in TRL's own loss: ranks of one tensor-parallel group see the same rows
            difference = difference * (self.accelerator.num_processes // self.get_tp_size())
        loss = loss + difference
        if model.training and not loss.requires_grad:
            # a batch without images gives the projector nothing to learn; its gradient is zero, not an error
            loss = loss + 0.0 * sum(p.sum() for p in model.parameters() if p.requires_grad)
        return (loss, result[1]) if return_outputs else loss

    @cached_property
    def _closing(self) -> list[int]:
        """The ids of `</CN>` and `</UN>`."""
        return list(verification_ids(get_tokenizer(self.processing_class)).closing)

    def _doubted(self, log_probs, hidden, doubts):
        """(batch, length - 1): what is to be added to the log-probability of a closing tag with a doubt; 0 elsewhere."""
        check_doubts(self.args)
        at = doubts[:, 1:] != NO_DOUBT
        both = next_token_log_probs(self.plain_model, hidden[:, :-1][at])[:, self._closing]
        wanted = doubts[:, 1:][at].to(both)
        gain = torch.zeros_like(log_probs)
        gain[at] = ((1 - wanted) * both[:, 0] + wanted * both[:, 1]).to(gain) - log_probs[at]
        return gain

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.args.projector_learning_rate is not None:
            model = args[0] if args else kwargs.get("model") or self.model
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            groups = parameter_groups(optimizer.param_groups, names, self.args.projector_learning_rate)
            optimizer.param_groups = list(groups)
        return optimizer


class SkippedRows(TrainerCallback):
    """What becomes of skipped rows: their file begins anew with a new run, `skipped_rows` is logged (of all processes and
    epochs, each row once), and the total is said at the end."""

    def __init__(self, rejects: Rejects, record: Callable[[Mapping[str, float]], None]):
        self.rejects, self.record = rejects, record

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            if state.is_world_process_zero:
                self.rejects.clear()
            PartialState().wait_for_everyone()  # nobody adds before it is cleared
            self.rejects.counts()  # and everybody knows that it is

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_log and state.is_world_process_zero:
            self.record({"skipped_rows": self.rejects.counts().total()})

    def on_train_end(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()
        if state.is_world_process_zero and (summary := self.rejects.summary()):
            logger.warning("%s.", summary)


def collator_settings(args: WeightedSFTConfig) -> dict[str, Any]:
    """What a trainer's settings say about any `VisionCollator`."""
    return {
        "max_length": args.max_length,
        "seed": data_seed(args),
        "pad_to_multiple_of": args.pad_to_multiple_of,
        "always_image": args.world_size > 1,
    }
