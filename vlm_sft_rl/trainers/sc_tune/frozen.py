"""A frozen copy of what a trainer trains, to act as partner, baseline and KL reference, without a second model.

Only trained tensors differ between a model and its frozen copy, so only they are copied: with LoRA that is a second
adapter, with full training a second set of the trained weights, and frozen towers are never doubled.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ...errors import UserError
from ...io import give_user_mode
from ...models.weights import FAILED_RUN, check_finite, refuse_codes


class FrozenCopy:
    """Copies of a model's trainable parameters, and a context in which the model computes with them.

    Exchanging the tensors is exchanging pointers: nothing is copied, and gradients and optimizer state stay with the
    live parameters.
    """

    def __init__(self, model: nn.Module):
        self._live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._frozen = {name: p.detach().clone() for name, p in self._live.items()}
        self._active = False

    @property
    def names(self) -> set[str]:
        """The parameters that are copied."""
        return set(self._live)

    def refresh(self) -> None:
        """Copy the live weights over the frozen ones."""
        self._check_inactive()
        for name, parameter in self._live.items():
            self._frozen[name].copy_(parameter.detach())

    def equals_live(self) -> bool:
        """Whether the live weights are those of the copy, to the last bit: both then are one network.

        They are compared and not remembered: so it holds after a resume and for updates that changed nothing. Weights that
        differ mostly do in the first tensor.
        """
        self._check_inactive()
        return all(torch.equal(p.detach(), self._frozen[name]) for name, p in self._live.items())

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within this context the model is the frozen copy. For passes without gradient."""
        self._check_inactive()
        self._exchange()
        self._active = True
        try:
            yield
        finally:
            self._active = False
            self._exchange()

    def save(self, path: str | Path) -> None:
        """Write the tensors as safetensors."""
        self._check_inactive()
        save_file({name: t.contiguous().cpu() for name, t in self._frozen.items()}, str(path))
        give_user_mode(Path(path).parent)

    def load(self, path: str | Path) -> None:
        """Read them back.

        Raises:
            UserError: the file is missing, damaged, or of another model.
        """
        if not Path(path).is_file():
            raise UserError(
                f"{path} is missing: the checkpoint was saved with `save_only_model: true`, or by a run without this copy "
                "(`kl_anchor: start` keeps one of the start). Resume with the settings the run was started with; with "
                "weights alone only a new run can begin."
            )
        try:
            stored = load_file(str(path))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path}: the frozen copy is damaged ({error}). Resume from an earlier checkpoint."
            ) from error
        if {name: t.shape for name, t in stored.items()} != {
            name: t.shape for name, t in self._frozen.items()
        }:
            raise UserError(
                f"{path}: the frozen copy is of a model that trains other weights. Resume with the settings the run was "
                "started with."
            )
        refuse_codes(stored, path)
        check_finite(stored.items(), path, FAILED_RUN)
        for name, tensor in self._frozen.items():
            tensor.copy_(stored[name])

    def _exchange(self) -> None:
        with torch.no_grad():
            for name, parameter in self._live.items():
                parameter.data, self._frozen[name] = self._frozen[name], parameter.data
        # autocast keeps the casts of a context by parameter, not by its data: the other weights would be computed with
        torch.clear_autocast_cache()

    def _check_inactive(self) -> None:
        if self._active:
            raise RuntimeError("the frozen copy is in use")
