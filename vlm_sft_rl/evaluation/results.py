"""What an evaluation leaves in its folder, field by field, and reading it back.

Files that another version wrote, that were edited or cut off, or that belong to something else are refused with the
line and the field, whichever command meets them.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..runs import RUN_FILE, SAMPLES, SUMMARY
from ..shapes import AMOUNT, COUNT, NUMBER, SHARE, Kinds, Map, Number, read_lines, read_object
from .decoders import DECODERS
from .metrics import load_metric
from .metrics.counting import CountMetric
from .specs import EvalSpec, parse_spec

BOX = [NUMBER] * 4
PHRASE = {"text": str, "p_unconfident": SHARE}
COUNTS = dict.fromkeys(
    ("tokens_forwarded", "tokens_kept", "forwards", "image_encodes", "prompt_tokens"), COUNT
)
# what can stand in the trace of an answer
EVENTS = {
    **dict.fromkeys(("accept", "flag"), PHRASE | {"tokens": COUNT}),
    "reject": {
        "reason": str,
        "text": str,
        "p_unconfident": (SHARE, None),
        "temperature": AMOUNT,
        "attempt": COUNT,
    },
    **{key: {"to": COUNT, "removed": str} for key in ("local_rewind", "sentence_rewind", "resume")},
    **{key: {"text": str} for key in ("hint", "false_premise", "asked", "locate")},
    "finish": {"reason": str, "ok": bool},
    "candidates": {"texts": [str], "probabilities?": [SHARE]},
    "search": {"name": str, "drawn": COUNT, "asked": COUNT, "scored": COUNT},
    "vote": {"keys": [(str, None)], "chosen": (COUNT, None), "selected?": (str, None)},
    "turn": {
        "number": COUNT,
        "text": str,
        "tokens": COUNT,
        "cut": bool,
        "probability": SHARE,
        "least_sure": SHARE,
    },
    "drawn": {"log_prob": NUMBER},
    "opera": {"returns": [COUNT]},
    **dict.fromkeys(("drop", "stop"), PHRASE),
}
REFERENCE = {
    "category?": (str, NUMBER, [(str, NUMBER)], None),
    "box?": (BOX, None),
    "choices?": ([str], None),
}
SAMPLE = {
    "id": str,
    "images": [str],
    "question": str,
    "prompt": str,
    "answer": str,
    "tagged_answer": str,
    "accepted_answer": str,
    "best_effort_answer": str,
    "ok": bool,
    "spans": [PHRASE | {"accepted": bool}],
    "counts": COUNTS,
    "trace": [Kinds("kind", EVENTS)],
    "reference": REFERENCE,
    "located?": (BOX, None),
    "leak?": bool,
}
VERDICTS = dict.fromkeys(("verified", "not_verified", "nothing_to_verify"), COUNT)
VERIFIER = {"auc": (dict.fromkeys(("value", "low", "high"), (NUMBER, None)), None)}
INTERVAL = {"value": NUMBER, "low": NUMBER, "high": NUMBER, "n": COUNT}
JUDGE = {"model": str, "prompt_sha256": str}
MANIFEST = {
    "spec": dict,
    "questions": str,
    "model": str,
    "model_digest": str,
    "decoding": {"decoder": str, "seed": Number(whole=True), "max_new_tokens": COUNT},
}
RESULTS = {
    "spec": str,
    "description": str,
    "model?": str,
    "decoder": str,
    "threshold": (SHARE, None),
    "metrics": Map(INTERVAL),
    "n": COUNT,
    "seed": Number(whole=True),
    "config": {"level": SHARE, "rounds": COUNT, "data_dir?": str},
    "judge?": {"model": str},
    "verdicts?": (VERDICTS, None),
}
AGAIN = "Give the command that made this folder again, or with another --output-dir."


@dataclass(frozen=True)
class FinishedRun:
    """The folder of an evaluation; `summary` is None before the run has ended. Samples are read when they are asked for."""

    folder: Path
    manifest: dict
    spec: EvalSpec
    summary: dict | None

    @cached_property
    def metric(self) -> CountMetric:
        # where the metric's own files were when the run was made
        data_dir = None if self.summary is None else self.summary["config"].get("data_dir")
        return load_metric(self.spec.metric, self.spec.metric_options, data_dir)

    @cached_property
    def samples(self) -> list[dict]:
        """Raises UserError: as `read_samples`."""
        return read_samples(self.folder, self.metric)

    @property
    def verifies(self) -> bool:
        """Whether its decoder verifies phrases."""
        decoder = DECODERS.get(self.manifest["decoding"]["decoder"])
        return decoder is not None and decoder.needs_tags


def read_run(folder: str | Path) -> FinishedRun:
    """An evaluation. Raises UserError: there is none, or a file of it is not what an evaluation writes."""
    folder = Path(folder)
    if not (folder / RUN_FILE).is_file():
        raise UserError(f"{folder}: no {RUN_FILE} in it. Give the output folder of `vlm-sft-rl eval run`.")
    manifest = read_manifest(folder)
    where = f"{folder / RUN_FILE}: spec"
    spec = parse_spec({key: value for key, value in manifest["spec"].items() if value is not None}, where)
    return FinishedRun(folder, manifest, spec, read_results(folder) if (folder / SUMMARY).is_file() else None)


def read_manifest(folder: str | Path) -> dict:
    """`run.json`. Raises UserError: it is not that of an evaluation."""
    return read_object(
        Path(folder, RUN_FILE), MANIFEST, f"Is this the folder of `vlm-sft-rl eval run`? {AGAIN}"
    )


def read_results(folder: str | Path, **further: Any) -> dict:
    """`summary.json`.

    Args:
        further: shapes of further fields that are needed.

    Raises UserError: there is none, or it is not that of an evaluation.
    """
    path = Path(folder, SUMMARY)
    if not path.is_file():
        raise UserError(
            f"{folder}: no {SUMMARY} in it. Give the output folder of a finished `vlm-sft-rl eval run`."
        )
    return read_object(path, RESULTS | further, f"Is this a summary of `vlm-sft-rl eval run`? {AGAIN}")


def read_samples(path: str | Path, metric: CountMetric | None = None) -> list[dict]:
    """All samples of an evaluation: of a file, or of a run's folder.

    Args:
        metric: that scored them; their ground truth must be one for it.

    Raises UserError: there is none, a line is not a sample, or an id comes twice.
    """
    path = Path(path)
    path = path / SAMPLES if path.is_dir() else path
    samples = list(
        read_lines(path, SAMPLE, f"Is this a samples file of `vlm-sft-rl eval run`? {AGAIN}", "id")
    )
    if not samples:
        raise UserError(f"{path}: no samples in it. Run the evaluation again.")
    if metric is not None:
        for sample in samples:
            check_reference(sample["reference"], metric, f"{path}, sample {sample['id']!r}")
    return samples


def check_reference(row: dict, metric: CountMetric, where: str) -> None:
    """Raises UserError: a question's ground truth is not what the metric needs."""
    fields = list(metric.reference_fields)
    field = f"field {fields[0]!r}: " if len(fields) == 1 else ""
    try:
        metric.check(metric.reference_of(row))
    except UserError as error:
        raise UserError(f"{where}, {field}{error}") from error
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        raise UserError(f"{where}, {field or 'the reference '}cannot be used ({error}).") from error
