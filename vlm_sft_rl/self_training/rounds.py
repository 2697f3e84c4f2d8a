"""What the loops of `self-train` share: rounds in folders of their own, whose stages stand under manifests.

Killed at any moment, the same command gives the same result as an uninterrupted run.
"""

import gc
import time
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from ..decoding.config import engine_version
from ..errors import UserError
from ..evaluation.decoders import EngineOptions
from ..io import read_jsonl, write_json, write_jsonl
from ..launch import module_command, run_command
from ..runs import model_digest, run_stage
from ..shapes import AMOUNT, Shape, read_object
from ..workers import Workers
from .config import HF_BATCH, LoopConfig
from .processes import Trainer


class Rounds:
    """One run of a loop: rounds 0 to `config.rounds`, each in `OUTPUT/round-N`.

    A loop has `round`, and says with `made_with` and `ends_with_dpo` what its rounds are made with and of.

    Args:
        config: the loop's settings.
        trainer: trains a round in a fresh process.
        base: the base model's folder or name.
        image_root: folder that image paths start from.
        seed: of everything that is drawn.

    Attributes:
        engine: what computes the answers, with its version; None: a server does.
    """

    def __init__(
        self,
        config: LoopConfig,
        trainer: Trainer,
        base: str,
        output_dir: str | Path,
        image_root: str | None,
        *,
        seed: int = 0,
        console: Console | None = None,
    ):
        config.check_self_training()
        self.config, self.trainer, self.base, self.seed = config, trainer, base, seed
        self.output, self.image_root = Path(output_dir), image_root
        self.console = console or Console()
        self.engine: str | None = engine_version(config.engine)
        self.workers = Workers(config.sample_ray, config.sample_processes) if config.sample_ray else None
        self.read()

    def read(self) -> None:
        """Read what the loop works on. Raises UserError: settings or files that cannot be used; before any work."""

    def round(self, round_: int) -> dict:
        """Do what is missing of a round; returns its metrics."""
        raise NotImplementedError

    def made_with(self, round_: int) -> dict[str, Any]:
        """What a round's rows and figures depend on; its models and answers have manifests of their own."""
        raise NotImplementedError

    def figures(self, rounds: list[dict]) -> dict[str, Any]:
        """What `summary.json` holds beside what it has for every loop."""
        raise NotImplementedError

    def ends_with_dpo(self, round_: int) -> bool:
        return round_ > 0 and "dpo" in self.config.round_objective

    @property
    def untrained(self) -> bool:
        """Whether round 0 is the base itself."""
        return True

    def folder(self, round_: int) -> Path:
        return self.output / f"round-{round_}"

    def model(self, round_: int) -> str:
        """The model at the end of a round."""
        if round_ == 0 and self.untrained:
            return self.base
        return str(self.folder(round_) / ("dpo" if self.ends_with_dpo(round_) else "train"))

    def start(self, round_: int) -> str:
        """The model that a round's training starts from."""
        previous = round_ > 0 and self.config.restart_from == "previous"
        return self.model(round_ - 1) if previous else self.base

    def run(self) -> list[dict]:
        """All rounds; returns their metrics. Raises UserError: vLLM is to answer, and cannot run the base."""
        if (
            self.config.engine == "vllm" and self.workers is None
        ):  # a cluster's machines may have what this one lacks
            from ..decoding.vllm_engine import check_runs

            check_runs(self.base)
        rounds = []
        for round_ in range(self.config.rounds + 1):
            started = time.monotonic()
            self.console.rule(f"[bold]round {round_}", align="left")
            try:
                rounds.append(self.round(round_))
            finally:
                self.free()
            before = read_seconds(self.folder(round_))
            seconds = round(before + time.monotonic() - started, 1)
            write_json(self.folder(round_) / "seconds.json", {"seconds": seconds})
        return rounds

    def claim(self, round_: int) -> None:
        """Refuse a folder whose rows and figures other settings made."""
        manifest = {
            "stage": "round",
            **self.made_with(round_),
            "seed": self.seed,
            "processes": self.trainer.processes,  # the rows of a step grow with them
        }
        run_stage(self.folder(round_), manifest, lambda: None)

    def free(self) -> None:
        """Give back what a round held."""
        gc.collect()

    def source(self, round_: int, model: str) -> str:
        """What is loaded for a round's model: vLLM takes whole ones alone."""
        return self.trainer.whole_model(model, self.folder(round_)) if self.config.engine == "vllm" else model

    @property
    def options(self) -> EngineOptions:
        config = self.config
        return EngineOptions(
            config.engine, config.sample_batch_size or (HF_BATCH if config.engine == "hf" else None)
        )

    @cached_property
    def in_process(self) -> bool:
        """On a CPU a process of its own would only cost its start; a GPU has to be free for the training."""
        import torch

        return self.config.sample_processes == 1 and not torch.cuda.is_available()

    def launch(self, folder: Path, job: dict) -> None:
        """Do a job of `worker` in processes of its own.

        Raises UserError: they failed.
        """
        job |= {"image_root": self.image_root, "folder": str(folder), "options": asdict(self.options)}
        command = module_command(
            "vlm_sft_rl.self_training.worker",
            [str(write_json(folder / "job.json", job))],
            self.trainer.accelerate_config,
            self.config.sample_processes,
        )
        if status := run_command(command):
            raise UserError(f"{job['label']}: failed with status {status}; the message is above.")


def identity(model: str) -> str:
    """A digest of a checkpoint folder, or a Hub name."""
    return model_digest(model) if Path(model).is_dir() else model


def write_once(path: Path, rows: list[dict]) -> None:
    """Write rows unless the file has exactly these: its time of change is part of the trainer's index."""
    try:
        written = read_rows(path) if path.is_file() else None
    except UserError:  # edited or cut off
        written = None
    if written != rows:
        write_jsonl(path, rows)


def read_figures(path: Path, shape: Shape) -> dict:
    """A small file of a round. Raises UserError: it is not what a round writes."""
    return read_object(path, shape, "It was edited or cut off: remove it, and give the same command again.")


def read_seconds(folder: Path) -> float:
    """How long a round has taken so far."""
    path = folder / "seconds.json"
    return read_figures(path, {"seconds": AMOUNT})["seconds"] if path.is_file() else 0.0


def read_rows(path: Path) -> list[dict]:
    return [row for _, row in read_jsonl(path)]
