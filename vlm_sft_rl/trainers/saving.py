"""What every trainer's checkpoints have in common: the sidecar, and weights that really come back on resume."""

from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

from ..errors import UserError
from ..models.load import restore_weights
from ..models.sidecar import Sidecar, write_sidecar


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
