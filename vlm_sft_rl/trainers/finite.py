"""Nothing that is not a number is trained or saved: every trainer stops before the update and names the step's rows."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor

from ..data.rejects import identity
from ..errors import NotFinite, UserError
from ..models.weights import is_finite

ROW_NAMES = "row_names"
ROWS_NAMED = 16


class NamingCollator:
    """A collator whose batches, where they are maps, also have the names of their rows (`ROW_NAMES`)."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, rows: list[Any]) -> Any:
        batch = self.collator(rows)
        if isinstance(batch, dict):
            batch[ROW_NAMES] = names_of(rows)
        return batch


def names_of(rows: Sequence[Any]) -> list[str]:
    """What tells rows from others: of packs those of their rows, of GRPO's questions their ids."""
    names: list[str] = []
    for row in rows:
        if not isinstance(row, Mapping):
            continue
        if isinstance(row.get("rows"), list):
            names += names_of(row["rows"])
        elif isinstance(row.get("row"), str):
            names.append(identity(json.loads(row["row"])))
        else:
            names.append(identity(row))
    return list(dict.fromkeys(names))


class FiniteSteps:
    """To be named before transformers' `Trainer` among the bases.

    Losses and gradients are looked at once per update, between the gradients' norm and the optimizer's step; weights are
    looked at before they are saved. A gradient that `fp16: true` has scaled too far is no error: its scaler leaves the
    update out and scales less, until it cannot.
    """

    _losses: list[torch.Tensor]
    _batches: list[tuple[int, Any]]

    def get_train_dataloader(self):
        collator, config = self.data_collator, self.args.accelerator_config
        # where one process reads for the others its batches are exchanged as tensors, which names are not
        dispatched = config.dispatch_batches or not hasattr(self.train_dataset, "__len__")
        if dispatched and self.args.world_size > 1:
            return super().get_train_dataloader()
        self.data_collator = NamingCollator(collator)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def train(self, *args, **kwargs):
        # an embedding's row that no step reads would be met when all is done, and nothing saved
        broken = [name for name, p in self.model.named_parameters() if p.requires_grad and not is_finite(p)]
        if self._anywhere(torch.tensor([bool(broken)]))[0]:
            raise UserError(
                f"{len(broken)} weights that are to be trained are not finite (NaN or infinite) before the first step"
                f"{': ' + broken[0] if broken else ''}. Load the model again."
            )
        return super().train(*args, **kwargs)

    def training_step(self, model, inputs, *args, **kwargs) -> torch.Tensor:
        self.note_rows(inputs)
        with self.naming_rows():
            loss = super().training_step(model, inputs, *args, **kwargs)
        self.note_loss(loss)
        return loss

    def note_rows(self, inputs: Any) -> None:
        """Take the names out of a batch and keep them until the next step."""
        step = self.state.global_step
        rows = inputs.pop(ROW_NAMES, []) if isinstance(inputs, dict) else inputs
        kept = [batch for batch in getattr(self, "_batches", []) if batch[0] == step]
        self._batches = [*kept, (step, rows)]

    def note_loss(self, loss: torch.Tensor) -> None:
        """Remember, without waiting for the GPU, whether a loss is finite."""
        self._losses = [*getattr(self, "_losses", []), torch.isfinite(loss.detach()).all()]

    @contextmanager
    def naming_rows(self) -> Iterator[None]:
        """Give an error about what was decoded within a step the step's rows."""
        try:
            yield
        except (NotFinite, RuntimeError) as error:
            # what torch says of probabilities that transformers draws from
            if isinstance(error, RuntimeError) and "probability tensor contains" not in str(error):
                raise
            raise self._stopped("logits of its own answers", names_of_all(self._batches)) from error

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.check_update(norm)
        return norm

    def check_update(self, grad_norm) -> None:
        """Raises UserError, on all processes at once: a loss since the last update, or the gradient, is not finite."""
        losses, self._losses = getattr(self, "_losses", []), []
        norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
        norm = torch.as_tensor(0.0 if norm is None else norm, device=self.args.device).detach()
        finite = torch.stack([*losses, torch.isfinite(norm).all()])
        broken = ~torch.stack([finite[:-1].all(), finite[-1]])
        broken_loss, broken_gradient = self._anywhere(broken)
        if not broken_loss and broken_gradient and self._scaler_goes_on():
            return
        if broken_loss or broken_gradient:
            batches = self._batches
            if len(losses) == len(batches) and not finite[:-1].all():
                batches = [batch for batch, fine in zip(batches, finite.tolist(), strict=False) if not fine]
            names = names_of_all(batches)
            if self.args.world_size > 1:
                names = list(dict.fromkeys(gather_object(names)))
            raise self._stopped("loss" if broken_loss else "gradient", names)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self.check_weights()
        super().save_model(output_dir, _internal_call)

    def check_weights(self) -> None:
        """Raises UserError, on all processes at once: a trained weight is not finite, so it is not saved."""
        weights = (
            p.to_local() if isinstance(p, DTensor) else p for p in self.model.parameters() if p.requires_grad
        )
        if self._anywhere(torch.tensor([not all(map(is_finite, weights))]))[0]:
            raise UserError(
                f"Behind step {self.state.global_step} trained weights are not finite, so they are not saved. "
                f"{self._cure()}"
            )

    def _anywhere(self, flags: torch.Tensor) -> list[bool]:
        """Which flags are set on any process."""
        if self.args.world_size > 1:
            flags = self.accelerator.reduce(flags.to(self.args.device, torch.float32), "sum") > 0
        return flags.tolist()

    def _scaler_goes_on(self) -> bool:
        if self.is_deepspeed_enabled:  # its scaler says itself when it cannot scale less
            return self.args.fp16 and self.accelerator.optimizer_step_was_skipped
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.is_enabled() and scaler.get_scale() >= 1

    def _stopped(self, what: str, names: Sequence[str]) -> UserError:
        shown = ", ".join(names[:ROWS_NAMED]) + (
            f" and {len(names) - ROWS_NAMED} more" if len(names) > ROWS_NAMED else ""
        )
        verb = "are" if what.startswith("logits") else "is"
        return UserError(
            f"Step {self.state.global_step + 1}: the {what} {verb} not finite (NaN or infinite), so training stops before "
            f"this update. Its rows: {shown or 'unknown'}. {self._cure()}"
        )

    def _cure(self) -> str:
        args, norm = self.args, self.args.max_grad_norm
        clipped = (
            f"`max_grad_norm` (it is {norm})" if norm > 0 else "`max_grad_norm: 1.0` (nothing is clipped now)"
        )
        precision = ", bf16 in the place of fp16" if args.fp16 else ""
        return (
            f"What was saved before stays. Lower `learning_rate` (it is {args.learning_rate:g}), set {clipped}{precision}; "
            "if it stops at the same rows again, look at them with `vlm-sft-rl data preview`."
        )


def names_of_all(batches: Sequence[tuple[int, Any]]) -> list[str]:
    """The names of the rows of a step's batches, each once."""
    named = (rows if all(isinstance(row, str) for row in rows) else names_of(rows) for _, rows in batches)
    return list(dict.fromkeys(name for names in named for name in names))
