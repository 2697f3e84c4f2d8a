"""One training stage: a recipe of its own, a fresh process, a model in the stage's folder."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from ..errors import UserError
from ..evaluation.run_config import model_digest
from ..files import write_text
from ..launch import process_count, run_command, training_command
from .stages import digest, run_stage

METHODS = {"sft": "sft", "dpo": "reflection_dpo"}
LOG_LINES = 12  # of the child's output that an error quotes


@dataclass
class Trainer:
    """Trains by `accelerate launch -m vlm_sft_rl.train`.

    Attributes:
        keys: objective (`sft`, `dpo`) -> the recipe's keys of its training.
        accelerate_config, num_processes: as for `vlm-sft-rl train`.
    """

    keys: dict[str, dict[str, Any]]
    accelerate_config: str = "single_gpu"
    num_processes: int | None = None

    @property
    def processes(self) -> int:
        return process_count(self.accelerate_config, self.num_processes)

    def train(self, objective: str, folder: Path, rows: Path, start: str, console: Console) -> None:
        """Train `start` on `rows` into `folder`, or go on from its last checkpoint, or do nothing if that is done.

        Raises:
            UserError: the child failed; its last lines are quoted and its whole output is in a log beside the folder.
        """
        begin = self.whole_model(start, folder.parent)
        recipe = {"method": METHODS[objective], **self.keys[objective]}
        manifest = {
            "stage": objective,
            # a run that was moved or copied is still the same run
            "recipe": {key: value for key, value in recipe.items() if key != "image_root"},
            "rows": digest(rows),
            "start": model_digest(begin) if Path(begin).is_dir() else begin,
        }
        recipe |= {
            "model_name_or_path": begin,
            "train_file": str(rows.resolve()),
            "output_dir": str(folder.resolve()),
        }
        path = folder.parent / f"{folder.name}.yaml"
        run_stage(folder, manifest, lambda: self._launch(path, recipe, folder, console))

    def _launch(self, path: Path, recipe: dict, folder: Path, console: Console) -> None:
        write_text(path, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
        log = folder.parent / f"{folder.name}.log"
        command = training_command(path, [], self.accelerate_config, self.num_processes)
        with console.status(f"  training {folder} (its output: {log})"), open(log, "ab") as handle:
            status = run_command(command, handle)
        if status:
            raise UserError(
                f"training {folder} failed with status {status}:\n{tail(log)}\n(all of it: {log})"
            )
        if not any(folder.glob("*.safetensors")):
            raise UserError(f"training {folder} ended without weights there. Its output is in {log}.")

    def whole_model(self, model: str, folder: Path) -> str:
        """The model itself, or an adapter merged into its base: DPO needs a reference on the disk, and an adapter on an
        adapter would be trained against the wrong one."""
        import torch

        from ..models.load import is_adapter
        from ..models.merge import merge

        if not Path(model).is_dir() or not is_adapter(model):
            return model
        adapter = Path(model)
        stage = folder / f"merged-{adapter.parent.name}-{adapter.name}"
        target = stage / "model"

        def fold() -> None:
            if not target.exists():  # it appears only when it is whole
                merge(adapter, target)
                # the training or the server that comes next needs the GPU's memory; torch would keep it for this process
                gc.collect()
                torch.cuda.empty_cache()

        run_stage(stage, {"stage": "merge", "adapter": model_digest(model)}, fold)
        return str(target.resolve())


def tail(log: Path) -> str:
    """The last lines of a log that say something: progress bars are left out."""
    text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    lines = [line for line in text.splitlines() if line.strip() and "it/s" not in line and "s/it" not in line]
    said = [i for i, line in enumerate(lines) if line.startswith("Error:")]
    return "\n".join(lines[said[-1] :] if said else lines[-LOG_LINES:])
