"""What makes a trainer alternate between two phases and a frozen copy: schedule, updates within a step, checkpoints."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from trl.trainer.base_trainer import _BaseTrainer

from ...errors import UserError
from ..base import VisionTrainer
from ..checks import sharded_by
from .config import phase_at
from .frozen import FrozenCopy

FROZEN_FILE, START_FILE = "frozen_copy.safetensors", "start_copy.safetensors"


def check_whole_weights(args) -> None:
    """Raises UserError: the weights are sharded, by ZeRO-3 or FSDP."""
    if (engine := sharded_by(args)) is not None:
        raise UserError(
            "SC-Tune generates with the model it trains and exchanges its weights with a frozen copy's: sharded weights "
            f"({engine}) are not supported. Launch with ddp or zero2; LoRA keeps the copy small."
        )


class AlternatingTrainer(VisionTrainer, _BaseTrainer):
    """Phases over transformers' `Trainer`; subclasses make the steps.

    The phase is a function of the step's number, so a resumed run needs the frozen copy's weights and nothing else
    beyond an ordinary checkpoint.

    Attributes:
        frozen: the copy of the last switch of phases; start: the one that KL is measured against, with
            `kl_anchor: start`. Both None before training begins.
    """

    def __init__(self, *args, **kwargs):
        self.frozen: FrozenCopy | None = None
        self.start: FrozenCopy | None = None
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list)}
        super().__init__(*args, **kwargs)

    def make_copies(self) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if self.frozen is None:
            self.frozen = FrozenCopy(model)
        if self.start is None and self.args.kl_coef and self.args.kl_anchor == "start":
            self.start = FrozenCopy(model)

    def begin_step(self) -> str:
        """The phase of the step to come. At the start of a phase the frozen copy is renewed and Adam forgets."""
        step = self.state.global_step
        phase, place = phase_at(step, self.args.describer_steps, self.args.locator_steps)
        self.make_copies()
        if place == 0 and step > 0:
            self.frozen.refresh()
            if self.args.reset_optimizer:
                optimizer = self.optimizer
                while hasattr(optimizer, "optimizer"):  # accelerate's and DeepSpeed's wrappers
                    optimizer = optimizer.optimizer
                optimizer.state.clear()
        return phase

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """The schedule of transformers, times the ratio of the two learning rates in locator phases."""
        if self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        scheduler, args = super().create_scheduler(num_training_steps, optimizer), self.args
        if not hasattr(scheduler, "lr_lambdas"):
            raise UserError(
                f"`lr_scheduler_type: {args.lr_scheduler_type}` cannot be scaled by phase. Choose constant, "
                "constant_with_warmup, linear or cosine."
            )
        ratio = args.locator_learning_rate / args.learning_rate

        def by_phase(plain):
            def factor(step: int) -> float:
                phase, _ = phase_at(step, args.describer_steps, args.locator_steps)
                return plain(step) * (ratio if phase == "locator" else 1.0)

            return factor

        scheduler.lr_lambdas = [by_phase(plain) for plain in scheduler.lr_lambdas]
        groups = scheduler.optimizer.param_groups
        for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = base * factor(0)
        return scheduler

    @contextmanager
    def decoding(self, model) -> Iterator[torch.nn.Module]:
        """The bare model in eval mode, without gradient, in the run's precision; back to training afterwards."""
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), self.accelerator.autocast():
                yield self.accelerator.unwrap_model(model)
        finally:
            model.train(training)

    @contextmanager
    def accumulating(self, model, *, last: bool) -> Iterator[None]:
        """Around the passes of one of several micro-batches: gradients are exchanged with the last one only."""
        if last:
            yield
            return
        state = self.accelerator.gradient_state
        state._set_sync_gradients(False)
        try:
            # DeepSpeed goes by the flag, and its own no_sync refuses ZeRO-2
            with nullcontext() if self.is_deepspeed_enabled else self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(True)

    def backward(self, loss: torch.Tensor) -> None:
        """Backward of a loss that is normalised over the whole step: processes are averaged, micro-batches are not."""
        self.note_loss(loss)
        options = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        self.accelerator.backward(loss * self.accelerator.num_processes, **options)

    def update(self, model) -> None:
        """An update within a step; the last one of a step is made by transformers' loop."""
        norm = self._clip_grad_norm(model) if self.args.max_grad_norm > 0 else None
        self._get_grad_norm(model, grad_norm=norm)
        self.optimizer.step()
        model.zero_grad()

    def skip_update(self) -> None:
        """Keep transformers' loop from updating at the end of this step: no moment and no weight decays.

        Its optimizer, DeepSpeed's and a gradient scaler's included, does nothing between synchronisations. The loop counts
        the step and moves the schedule on, and says anew before the next one whether gradients are synchronised.
        """
        self.accelerator.gradient_state._set_sync_gradients(False)

    def _clip_grad_norm(self, model):
        # a gradient scaler refuses to unscale where there was no backward
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        if not self.accelerator.sync_gradients:
            return 0.0
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _save_checkpoint(self, model, trial) -> None:
        # as TRL's trainers do: the card lies beside the checkpoints
        self.create_model_card(model_name=Path(self.args.hub_model_id or self.args.output_dir).name)
        super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            for copy, name in ((self.frozen, FROZEN_FILE), (self.start, START_FILE)):
                if copy is not None:
                    copy.save(Path(output_dir) / name)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self.make_copies()
        for copy, name in ((self.frozen, FROZEN_FILE), (self.start, START_FILE)):
            if copy is not None:
                copy.load(Path(checkpoint) / name)

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, float32."""
        return self.accelerator.reduce(value.detach().to(self.args.device, torch.float32), "sum")

    def any(self, flags: torch.Tensor) -> bool:
        """Whether a flag is set on any process."""
        return bool(self.total(flags.any()) > 0)

    def means(self, figures: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        """(sum, count) of this process -> mean over all processes."""
        totals = self.total(torch.tensor([[float(s), float(n)] for s, n in figures.values()])).cpu()
        return dict(zip(figures, (totals[:, 0] / totals[:, 1].clamp(min=1)).tolist(), strict=True))

    def record_phase(self, phase: str, figures: Mapping[str, float]) -> None:
        """Figures of this step; means over steps join the next log record."""
        self.record({f"{phase}/{name}": value for name, value in figures.items()})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            metrics = self._metrics["train"]
            logs |= {name: sum(values) / len(values) for name, values in metrics.items()}
            metrics.clear()
        super().log(logs, start_time)
