"""Start a training run in a fresh process through `accelerate launch`."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .recipes import find


def training_command(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    accelerate_config: str = "single_gpu",
    num_processes: int | None = None,
) -> list[str]:
    """The command line that `accelerate launch -m vlm_sft_rl.train --config RECIPE …` stands for.

    Raises:
        UserError: the recipe or the accelerate config does not exist.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(find("accelerate_configs", accelerate_config))]
    if num_processes is not None:
        command += ["--num_processes", str(num_processes)]
    return [*command, "-m", "vlm_sft_rl.train", "--config", str(find("recipes", str(recipe))), *overrides]


def launch_training(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    accelerate_config: str = "single_gpu",
    num_processes: int | None = None,
) -> int:
    """Run the command in the foreground and return its exit status."""
    return subprocess.call(training_command(recipe, overrides, accelerate_config, num_processes))
