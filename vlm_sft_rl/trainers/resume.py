"""What a run goes on from beside its weights: state, optimizer, schedule and random numbers, all of the same run."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from ..errors import UserError, first_line
from ..io import give_user_mode
from ..models.load import restore_weights
from ..models.weights import is_finite
from ..shapes import AMOUNT, COUNT, Map, Number, read_object

STATE = {
    "global_step": COUNT,
    "max_steps": Number(-1, whole=True),
    "train_batch_size": Number(1, whole=True),
    "epoch": (AMOUNT, None),
    "log_history": [dict],
    "stateful_callbacks": Map((dict, [dict])),
    "best_model_checkpoint?": (str, None),
}
CURE = "Take another checkpoint, or start anew with `resume_from_checkpoint: no`."
REFERENCE, RUNNING = "reference_model", "running_state"
# of transformers' loop and of TRL's trainers
SUMS = (
    "_tr_loss",
    "_total_loss_scalar",
    "_globalstep_last_logged",
    "_initial_global_step",
    "_total_train_tokens",
)
# what an optimizer keeps for every single weight
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg")

logger = logging.getLogger(__name__)


def check_state(checkpoint: str | Path, max_steps: int) -> None:
    """Raises UserError: `trainer_state.json` is not what this version of transformers writes."""
    path = Path(checkpoint) / TRAINER_STATE_NAME
    state = read_object(path, STATE, CURE)
    if unknown := sorted(state.keys() - {field.name for field in fields(TrainerState)}):
        raise UserError(
            f"{path}: {unknown[0]!r} is unknown to this version of transformers, so another one wrote it. {CURE}"
        )
    if 0 < max_steps < state["global_step"]:
        logger.warning(
            "%s is of step %d, and `max_steps` is %d: nothing is trained.",
            checkpoint,
            state["global_step"],
            max_steps,
        )


@contextmanager
def restoring(checkpoint: str | Path, what: str) -> Iterator[None]:
    """Turn whatever torch makes of a file that is damaged, or of another run, into one message."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of many types
        raise UserError(
            f"{checkpoint}: {what} cannot be taken into this run ({first_line(error):.150}). It is damaged, or of a run "
            f"with other settings. {CURE}"
        ) from error


class Resuming:
    """To be named before transformers' `Trainer` among the bases: a run goes on from all of a checkpoint, or not at all."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        checkpoint = resume_from_checkpoint
        if checkpoint is True:  # transformers says where there is none
            checkpoint = get_last_checkpoint(self.args.output_dir)
        if checkpoint:
            check_state(checkpoint, self.args.max_steps)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _run_epoch(self, model, epoch, train_dataloader, *args, **kwargs) -> None:
        # transformers looks for the end of training only behind a step: a run that was killed between its last checkpoint
        # and the end, inside of an epoch, would be resumed with one step too many
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        # where batches are shared out among processes accelerate does not find a sampler of ours behind the batches that a
        # resumed run skips: its rows would come in the order of the first epoch
        train_dataloader.set_epoch(epoch)
        super()._run_epoch(model, epoch, train_dataloader, *args, **kwargs)

    def running_state(self) -> dict[str, Any]:
        """What this process knows beside weights, optimizer and random numbers: sums for the log, and what a subclass adds.

        Returns:
            Tensors and plain values, for `take_running_state` of the same process.
        """
        return {
            "sums": {name: getattr(self, name) for name in SUMS if hasattr(self, name)},
            "metrics": {
                mode: {name: [float(value) for value in values] for name, values in figures.items()}
                for mode, figures in self._metrics.items()
            },
        }

    def take_running_state(self, state: dict[str, Any]) -> None:
        for name, value in state["sums"].items():
            if name in SUMS:  # and no other attribute that a file may name
                float(value)  # raises where it is no number
                setattr(self, name, value)
        for mode, figures in state["metrics"].items():
            figures = {name: [float(value) for value in values] for name, values in figures.items()}
            self._metrics[mode].update(figures)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        state = self.running_state() | {"world_size": self.args.world_size}
        torch.save(state, Path(output_dir) / f"{RUNNING}_{self.args.process_index}.pth")

    @property
    def _moving_reference(self) -> Any:
        """The reference model that follows the trained one (`sync_ref_model`); None where there is none, or in shards."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        follows = getattr(self.args, "sync_ref_model", False) and not sharded
        return self.accelerator.unwrap_model(self.ref_model) if follows else None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and (reference := self._moving_reference) is not None:
            reference.save_pretrained(Path(output_dir) / REFERENCE)
            give_user_mode(Path(output_dir) / REFERENCE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and getattr(self.args, "sync_ref_model", False):
            folder, reference = Path(checkpoint) / REFERENCE, self._moving_reference
            if reference is None or not folder.is_dir():
                raise UserError(
                    f"{checkpoint}: no {REFERENCE}, which `sync_ref_model` moves. FSDP and DeepSpeed do not keep it. {CURE}"
                )
            restore_weights(reference, folder)
        if checkpoint is None or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        for name in (OPTIMIZER_NAME, SCHEDULER_NAME):
            # transformers would begin with fresh moments, and say nothing
            if not (Path(checkpoint) / name).is_file():
                raise UserError(
                    f"{checkpoint}: no {name}, so it was saved with `save_only_model: true` or not copied whole, and no run "
                    f"can go on from it. {CURE}"
                )
        settings = [set(group) for group in self.optimizer.param_groups]
        with restoring(checkpoint, f"{OPTIMIZER_NAME} or {SCHEDULER_NAME}"):
            super()._load_optimizer_and_scheduler(checkpoint)
        self._check_optimizer(f"{checkpoint}/{OPTIMIZER_NAME}", settings)

    def _check_optimizer(self, file: str, settings: list[set[str]]) -> None:
        """torch takes any state with as many weights, and fails, or crashes, at the first update.

        Raises UserError: the state is of another optimizer, of other weights, or not finite.
        """
        groups, state = self.optimizer.param_groups, self.optimizer.state
        for group, names in zip(groups, settings, strict=True):
            if missing := sorted(names - group.keys()):
                raise UserError(f"{file}: it is of another optimizer, without `{missing[0]}`. {CURE}")
        for weight in (weight for group in groups for weight in group["params"]):
            for name, value in state.get(weight, {}).items():
                if not isinstance(value, torch.Tensor):
                    continue
                if name in MOMENTS and value.shape != weight.shape:
                    raise UserError(
                        f"{file}: `{name}` of a weight of shape {list(weight.shape)} has shape {list(value.shape)}, so it "
                        f"is of another model. {CURE}"
                    )
                if not is_finite(value):
                    raise UserError(
                        f"{file}: `{name}` has numbers that are not finite, of a run that failed. {CURE}"
                    )

    def _load_scaler(self, checkpoint: str | None) -> None:
        with restoring(checkpoint, SCALER_NAME):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        rank = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        if not (Path(checkpoint) / (name := f"rng_state{rank}.pth")).is_file():
            logger.warning(
                "%s: no %s (was it saved by another number of processes?): what is drawn at random, such as dropout, "
                "differs from a run that was never stopped.",
                checkpoint,
                name,
            )
        with restoring(checkpoint, name):
            super()._load_rng_state(checkpoint)
        # transformers comes here between the batch that a resumed run begins with and its first step
        if not (Path(checkpoint) / (name := f"{RUNNING}_{self.args.process_index}.pth")).is_file():
            return
        with restoring(checkpoint, name):
            state = torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
            # all processes take theirs, or none does
            if state["world_size"] == self.args.world_size:
                self.take_running_state(send_to_device(state, self.args.device))
