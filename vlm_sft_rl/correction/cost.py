"""What a point of accuracy costs: tokens, floating-point operations and seconds, in training and per answer."""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ..errors import UserError
from ..evaluation.corrections import flips
from ..evaluation.metrics.counting import CountMetric
from ..evaluation.samples import read_samples
from ..evaluation.turns import statuses
from ..files import read_json


@dataclass(frozen=True)
class System:
    """A finished evaluation, and the training runs that led from the baseline to its model (none for the baseline)."""

    name: str
    run: Path
    trained: tuple[Path, ...] = ()


def parse_system(text: str) -> System:
    """`NAME=RUN` or `NAME=RUN@TRAIN1,TRAIN2`. Raises UserError: anything else."""
    name, equals, rest = text.partition("=")
    run, _, trained = rest.partition("@")
    if not (name.strip() and equals and run.strip()):
        raise UserError(f"{text!r}: write a system as NAME=RUN_FOLDER or NAME=RUN_FOLDER@TRAINING_FOLDER,…")
    return System(name.strip(), Path(run), tuple(Path(t) for t in trained.split(",") if t))


def parameter_count(folder: str | Path) -> int:
    """Parameters in the safetensors files of a checkpoint, read from their headers alone.

    Raises:
        UserError: there is no such file.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no safetensors file, so the model's size is unknown.")
    total = 0
    for path in files:
        with open(path, "rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(length))
        total += sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total


def training_cost(folder: str | Path) -> dict[str, float]:
    """Tokens, FLOPs (6 x parameters x tokens) and seconds of a training run, from its trainer_state.json.

    Raises:
        UserError: the folder has no finished run.
    """
    path = Path(folder) / "trainer_state.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file. Name the output_dir of a training run that was finished.")
    history = read_json(path).get("log_history", [])
    tokens = max((entry.get("num_tokens", 0) for entry in history), default=0)
    seconds = sum(entry.get("train_runtime", 0) for entry in history)
    return {"tokens": tokens, "flops": 6 * parameter_count(folder) * tokens, "seconds": seconds}


def cost_table(
    systems: Sequence[System],
    metric: CountMetric,
    model_of: dict[str, Path],
    rounds: int = 1000,
    seed: int = 0,
) -> list[dict]:
    """One row a system, the first being the baseline: accuracy, gain over it (paired), and what both halves cost.

    Args:
        model_of: the model folder of each system, for its parameters.

    Raises:
        UserError: runs on different questions, a metric that judges no whole answers, or missing files.
    """
    rows, before, ids = [], None, None
    for system in systems:
        samples = {s["id"]: s for s in read_samples(system.run)}
        ids = ids or list(samples)
        if set(ids) != set(samples):
            raise UserError(
                f"{system.run}: not the questions of the first run. Compare runs of one benchmark."
            )
        answers = _graded([samples[i] for i in ids], metric)
        before = before or answers
        found = flips(before, answers, rounds, seed)
        forwarded = sum(samples[i]["counts"]["tokens_forwarded"] for i in ids) / len(ids)
        parameters = parameter_count(model_of[system.name])
        training = [training_cost(folder) for folder in system.trained]
        total = {k: sum(t[k] for t in training) for k in ("tokens", "flops", "seconds")}
        points = 100 * found["net_flips"]["value"]
        rows.append(
            {
                "system": system.name,
                "accuracy": found["after"],
                "gain": found["net_flips"],
                "tokens_per_answer": forwarded,
                "flops_per_answer": 2 * parameters * forwarded,
                "training": total,
                # what a point costs is only defined where there is a gain
                "training_per_point": {k: v / points for k, v in total.items()} if points > 0 else None,
                "n": found["n"],
            }
        )
    return rows


def _graded(samples: Sequence[dict], metric: CountMetric) -> list[tuple[str, str | None]]:
    verdicts = statuses(samples, metric)
    if verdicts is None:
        raise UserError(
            "Cost per point needs a metric that judges whole answers (yes_no, answer_accuracy, …)."
        )
    texts = [sample["answer"].strip().casefold() for sample in samples]
    return list(zip(verdicts, texts, strict=True))
