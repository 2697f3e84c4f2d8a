"""What the studies of this folder share: training in this process, captions of a model, and figures over seeds."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from vlm_sft_rl import train
from vlm_sft_rl.correction.cost import training_cost
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.bootstrap import differences
from vlm_sft_rl.evaluation.metrics import load_metric
from vlm_sft_rl.evaluation.results import read_samples
from vlm_sft_rl.evaluation.runner import evaluate_spec
from vlm_sft_rl.evaluation.scoring import count_matrix, score, to_json
from vlm_sft_rl.evaluation.specs import EvalOptions, load_spec
from vlm_sft_rl.io import read_json

ROUNDS = 1000  # of the bootstrap


def command(text: str, data: str | None = None) -> argparse.ArgumentParser:
    """The command line of a study, whose module's text is given: a folder to write, and finished demos, one a seed, or the
    one folder of data that is described."""
    parser = argparse.ArgumentParser(description=text.partition("\n")[0])
    parser.add_argument("output", type=Path)
    if data is None:
        parser.add_argument("demos", type=Path, nargs="+")
    else:
        parser.add_argument("data", type=Path, help=data)
    return parser


def fit(recipe: str, output: Path, **settings) -> dict:
    """Train by a recipe in this process; a finished run is left as it is. Returns what it cost."""
    if not (output / "model.safetensors").is_file():
        words = []
        for key, value in {"output_dir": output, **settings}.items():
            words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
        if train.main(["--config", recipe, *words]):
            raise UserError(f"{output}: training failed; the message is above.")
    return training_cost(output)


def as_demo_chose(demo: Path) -> dict:
    """The settings of retrospective resampling that the demo chose on its validation scenes."""
    sidecar = read_json(demo / "models/reverse/vlm_sft_rl.json")
    return {"threshold": sidecar["threshold"], **sidecar["decoding"]}


def answers_of(
    model: Path,
    spec: str | Path,
    output: Path,
    data: Path,
    decoder: str = "greedy",
    settings: dict | None = None,
    limit: int | None = None,
) -> list[dict]:
    """A model's answers to the questions of a spec; a finished run is read."""
    evaluate_spec(
        spec,
        model,
        output_dir=output,
        data_dir=data,
        decoder=decoder,
        settings=settings or {},
        options=EvalOptions(batch_size=64, report=False, limit=limit),
        console=Console(quiet=True),
    )
    return read_samples(output)


def of_seed(samples: Sequence[dict], seed: int) -> list[dict]:
    """Samples whose ids tell seeds apart: pictures of different seeds have the same names."""
    return [{**sample, "id": f"{seed}/{sample['id']}"} for sample in samples]


def measure(
    samples: dict[str, list[dict]], spec: str | Path, names: Sequence[str], bases: Sequence[str] = ("start",)
) -> dict[str, dict]:
    """Figures of systems over all seeds, and their paired differences from the bases that are among them."""
    loaded = load_spec(spec)
    metric = load_metric(loaded.metric, loaded.metric_options)
    counts = {system: count_matrix(answers, metric) for system, answers in samples.items()}
    figures = {}
    for system, answers in samples.items():
        scored = score(answers, metric, ROUNDS)
        figures[system] = {
            "n": scored["n"],
            "metrics": {name: scored["metrics"][name] for name in names},
            "verifier": scored["verifier"],
            "cost": scored["cost"],
        }
        for base in bases:
            if base != system and base in counts:
                gaps = to_json(differences(counts[system], counts[base], metric.statistics, ROUNDS))
                figures[system][f"minus_{base}"] = {name: gaps[name] for name in names}
    return figures


def shown(interval: dict | None) -> str:
    """`value [low, high]`."""
    if interval is None:
        return "–"
    return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"
