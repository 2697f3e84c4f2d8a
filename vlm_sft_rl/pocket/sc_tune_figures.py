"""What the describer-locator demo measures: self-consistency and REC by their eval specs, exact descriptions, captions."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from ..evaluation.bootstrap import Interval, bootstrap, paired, ratio
from ..evaluation.compare import pair_runs
from ..evaluation.runner import evaluate_spec
from ..evaluation.samples import read_samples
from .regions import thing_in
from .twins import picks_out
from .world import Scene

ROUNDS = 1000
# eval spec -> its metrics, by the names they have here
SPECS = {
    "pocket_self_consistency": {
        "mean_iou": "self_consistency_iou",
        "acc50": "self_consistency_acc50",
        "parse_rate": "parse_rate",
        "leak_rate": "leak_rate",
        "words": "words",
    },
    "pocket_rec": {"acc50": "rec_acc50"},
    "pocket_captions": {"chair_i": "caption_chair_i", "coverage": "caption_coverage"},
}
# what summaries and tables show of them
SHOWN = ("self_consistency_iou", "rec_acc50", "reg_exact", "caption_chair_i", "caption_coverage")
LABELS = {
    "self_consistency_iou": "Self-consistency, mean IoU",
    "self_consistency_acc50": "Self-consistency, acc@0.5",
    "rec_acc50": "REC acc@0.5",
    "reg_exact": "Descriptions that pick out the one thing",
    "parse_rate": "Located boxes that parse",
    "leak_rate": "Descriptions that spell coordinates",
    "words": "Words per description",
    "caption_chair_i": "Captions, CHAIR-i (lower is better)",
    "caption_coverage": "Captions, coverage",
}


def run_folder(folder: Path, system: str, spec: str) -> Path:
    """Where the demo keeps one evaluation."""
    return folder / "eval" / f"{system}-{spec.removeprefix('pocket_')}"


def measure(
    folder: Path, system: str, *, regions: Path, world: Path, scenes: Mapping[str, Scene], seed: int
) -> dict:
    """Evaluate `folder/models/system`; runs that are finished are read.

    Returns:
        `{"metrics": {name: {"value", "low", "high", "n"}}, "n": boxes}`, names as in `LABELS`.
    """
    options = {"seed": seed, "rounds": ROUNDS, "batch_size": 32, "console": Console(quiet=True)}
    metrics = {}
    for spec, names in SPECS.items():
        out, data_dir = run_folder(folder, system, spec), world if spec == "pocket_captions" else regions
        summary = evaluate_spec(
            spec, folder / "models" / system, output_dir=out, data_dir=data_dir, **options
        )
        metrics |= {ours: summary["metrics"][name] for name, ours in names.items()}
    samples = described(folder, system)
    metrics["reg_exact"] = bootstrap(exact_counts(samples, scenes), _share, ROUNDS, seed).to_json()
    return {"metrics": metrics, "n": len(samples)}


def described(folder: Path, system: str) -> list[dict]:
    """The samples of self-consistency: every box with its description and where that led."""
    return read_samples(run_folder(folder, system, "pocket_self_consistency"))


def exact_counts(samples: Sequence[dict], scenes: Mapping[str, Scene]) -> np.ndarray:
    """Per image, `(images, 2)`: descriptions that are true of the box's thing and of no other in its scene, and boxes."""
    counts: dict[str, list[int]] = {}
    for sample in samples:
        image = sample["reference"]["image"]
        own, thing = counts.setdefault(image, [0, 0]), thing_in(sample["reference"], scenes[image])
        own[0] += picks_out(sample["answer"], thing, scenes[image])
        own[1] += 1
    return np.array(list(counts.values()), dtype=float)


def differences(
    folder: Path, ours: str, theirs: str, scenes: Mapping[str, Scene], seed: int
) -> dict[str, Interval]:
    """Paired differences of two systems, with whole images resampled together; names as in `LABELS`."""
    found = {}
    for spec, names in SPECS.items():
        both = [run_folder(folder, system, spec) for system in (ours, theirs)]
        metrics = pair_runs(*both, rounds=ROUNDS, seed=seed).result["metrics"]
        found |= {own: Interval(**metrics[name]["difference"]) for name, own in names.items()}
    counts = [exact_counts(described(folder, system), scenes) for system in (ours, theirs)]
    found["reg_exact"] = paired(*counts, _share, ROUNDS, seed)
    return found


def _share(totals: np.ndarray) -> np.ndarray:
    return ratio(totals[..., 0], totals[..., 1])
