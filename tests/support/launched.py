"""Training runs as users start them: a recipe file, and the command line that launches it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml
from tagged_rows import write_rows

from vlm_sft_rl.recipes import find
from vlm_sft_rl.train import last_complete_checkpoint


def recipe(folder: Path, **changes) -> Path:
    """A recipe over sixteen rows and the checkpoint `folder/prepared`."""
    rows = write_rows(folder / "data", count=16)
    settings = {
        "method": "reverse",
        "model_name_or_path": str(folder / "prepared"),
        "train_file": str(rows),
        "image_root": str(rows.parent),
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "seed": 3,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1.0e-3,
        "gradient_checkpointing": False,
        "save_steps": 2,
        "logging_steps": 1,
        "disable_tqdm": True,
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def command(path: Path, *words: str, processes: int = 1) -> list[str]:
    config = find("accelerate_configs", "cpu")
    if processes > 1:
        # accelerate's own way to several CPU processes is mpirun; its data-parallel launcher takes CPUs as well
        settings = yaml.safe_load(find("accelerate_configs", "ddp").read_text())
        config = path.with_name("ddp_cpu.yaml")
        settings |= {
            "use_cpu": True,
            "mixed_precision": "no",
            "num_processes": processes,
            "main_process_port": 0,
        }
        config.write_text(yaml.safe_dump(settings))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    return [*launch, "-m", "vlm_sft_rl.train", "--config", str(path), *words]


def launch(words: list[str]) -> str:
    """Run a command to its end; returns what it said on standard error."""
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def kill_at_first_checkpoint(words: list[str], output: Path) -> None:
    """Start a run and kill it, with its children, once its first checkpoint is complete."""
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while last_complete_checkpoint(output)[0] is None:
        assert process.poll() is None, "ended before it was killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
