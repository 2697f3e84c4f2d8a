"""What a point of accuracy costs: tokens, floating-point operations and seconds, in training and per answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..errors import UserError
from ..evaluation.metrics.counting import CountMetric
from ..evaluation.results import read_samples
from ..evaluation.turns import flips, statuses
from ..shapes import AMOUNT, COUNT, read_object

LOGGED = ("train_runtime", "num_tokens", "tokens_trained", "tokens_forwarded", "completions/mean_length")
TRAINER_STATE = {"log_history": [{f"{name}?": AMOUNT for name in LOGGED}]}
# of the summary of `data correct`
BUILT = {
    "seconds": AMOUNT,
    "config": {"model": (str, None), "teacher": str},
    "cost": dict.fromkeys(
        ("attempts", "teacher"), ({}, {"prompt_tokens": COUNT, "completion_tokens": COUNT})
    ),
}


@dataclass(frozen=True)
class System:
    """A finished evaluation, and the runs (training, building of rows) that led from the baseline to its model."""

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

    Raises UserError: there is no such file, or it is damaged.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no safetensors file, so the model's size is unknown.")
    total = 0
    for path in files:
        try:
            with safe_open(path, "np") as tensors:
                names = tensors.keys()
                total += sum(prod(tensors.get_slice(name).get_shape()) for name in names)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: its header cannot be read ({error}). Save the model again.") from error
    return total


def training_cost(folder: str | Path) -> dict[str, float | None]:
    """Tokens, FLOPs and seconds of what led to a model: a training run, or a folder that `data correct` wrote.

    A token costs 2 FLOPs a parameter where it is forwarded, 6 where it is trained on. `tokens` counts both kinds, so that
    what RL samples and then trains on is counted twice. Runs that log no tokens (SC-Tune's) have None for both.

    Raises UserError: the folder has neither a finished run nor built rows.
    """
    folder = Path(folder)
    path = folder / "trainer_state.json"
    if not path.is_file():
        if (folder / "rows.jsonl").is_file() and (folder / "summary.json").is_file():
            return _building_cost(folder)
        raise UserError(
            f"{path}: no such file. Name the output_dir of a training run that was finished, or of `data correct`."
        )
    cure = "It is no trainer state of transformers, or it was cut off. Leave this training out."
    history = read_object(path, TRAINER_STATE, cure)["log_history"]

    def most(name: str) -> float | None:
        return max((entry[name] for entry in history if name in entry), default=None)

    seconds = sum(entry.get("train_runtime", 0) for entry in history)
    tokens = most("num_tokens")
    if tokens is None:
        return {"tokens": None, "flops": None, "seconds": seconds}
    trained, forwarded = most("tokens_trained") or tokens, most("tokens_forwarded")
    if forwarded is None:
        # TRL's own RL trainers log what they sample once: at the least it was forwarded and trained on
        forwarded = tokens if most("completions/mean_length") is not None else 0
    parameters = parameter_count(folder)
    return {
        "tokens": trained + forwarded,
        "flops": parameters * (6 * trained + 2 * forwarded),
        "seconds": seconds,
    }


def _building_cost(folder: Path) -> dict[str, float]:
    """What sampling attempts and asking a teacher took, from the summary of `data correct`; gold answers are free.

    Raises UserError: an endpoint was asked, whose model's size is unknown.
    """
    cure = "Is this the folder of `vlm-sft-rl data correct`? Give that command again."
    summary = read_object(folder / "summary.json", BUILT, cure)
    config, total = summary["config"], {"tokens": 0, "flops": 0, "seconds": summary["seconds"]}
    for part, model in (("attempts", config["model"]), ("teacher", config["teacher"])):
        counts = summary["cost"][part]
        if not counts:
            continue
        if "://" in model:
            raise UserError(f"{folder}: answers came from {model}, so their FLOPs are unknown. Leave it out.")
        tokens = counts["prompt_tokens"] + counts["completion_tokens"]
        total["tokens"] += tokens
        total["flops"] += 2 * parameter_count(model) * tokens
    return total


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

    Raises UserError: runs on different questions, a metric that judges no whole answers, or missing files.
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
        change = flips(before, answers, rounds, seed)
        forwarded = sum(samples[i]["counts"]["tokens_forwarded"] for i in ids) / len(ids)
        parameters = parameter_count(model_of[system.name])
        training = [training_cost(folder) for folder in system.trained]
        total = {k: _sum([t[k] for t in training]) for k in ("tokens", "flops", "seconds")}
        points = 100 * change["net_flips"]["value"]
        rows.append(
            {
                "system": system.name,
                "accuracy": change["after"],
                "gain": change["net_flips"],
                "tokens_per_answer": forwarded,
                "flops_per_answer": 2 * parameters * forwarded,
                "training": total,
                # what a point costs is only defined where there is a gain
                "training_per_point": {k: v and v / points for k, v in total.items()} if points > 0 else None,
                "n": change["n"],
            }
        )
    return rows


def _sum(values: Sequence[float | None]) -> float | None:
    """Unknown where one is."""
    return None if None in values else sum(values)


def _graded(samples: Sequence[dict], metric: CountMetric) -> list[tuple[str, str | None]]:
    verdicts = statuses(samples, metric)
    if verdicts is None:
        raise UserError(
            "Cost per point needs a metric that judges whole answers (yes_no, answer_accuracy, …)."
        )
    texts = [sample["answer"].strip().casefold() for sample in samples]
    return list(zip(verdicts, texts, strict=True))
