"""The loop on rewinds: a REVERSE model answers pictures without labels and learns from what it took back.

    OUTPUT/round-0/test/{greedy,retrospective}/ metrics.json                                  (the start)
    OUTPUT/round-1/answers/ rows/{pairs,finished}.jsonl train/ dpo/ test/{…,reading}/ metrics.json
    OUTPUT/round-2/…   OUTPUT/summary.json   OUTPUT/report.html

Answers to questions with a truth are graded (`loop`); here the verifier is the only judge, so every round also reads what
the start said: where P(</UN>) no longer tells its wrong phrases from its right ones, a later round learns nothing true.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from ..data.images import locate, open_image
from ..data.numbered import asked_row
from ..data.tagging.pairs import NoPairs, write_pairs
from ..decode import DecodeOptions, decode
from ..errors import UserError, in_words
from ..evaluation.bootstrap import differences
from ..evaluation.decoders import EngineOptions, check_engine, configure, recorded
from ..evaluation.metrics import load_metric
from ..evaluation.questions import load_questions
from ..evaluation.report import interval_text
from ..evaluation.results import read_results, read_samples
from ..evaluation.runner import evaluate_spec
from ..evaluation.scoring import (
    count_matrix,
    phrase_verdicts,
    said_before,
    to_json,
    verifier_summary,
    with_verdicts,
)
from ..evaluation.specs import EvalOptions, load_spec
from ..io import read_json, write_json
from ..runs import digest, run_stage
from ..workers import Workers, process_share
from .config import RewindLoopConfig
from .pool import read_questions
from .rounds import Rounds, identity, write_once

GREEDY, RETROSPECTIVE = "greedy", "retrospective"
SHARD_ROWS = 1000  # at the most: what is held in memory, and what a process answers
FINISHED, READING = "finished answers", "reading.json"


class Rewinds(Rounds):
    """One run of the loop.

    Attributes:
        pictures: all rows to answer, as asked.
        metric: of the test, and which of its phrases are wrong.

    Raises UserError: settings, files or a base that cannot be used; before any work.
    """

    config: RewindLoopConfig

    def read(self) -> None:
        config = self.config
        decoding = configure(RETROSPECTIVE, Path(self.base), config.decoding or {}, seed=self.seed)
        check_engine(config.engine, RETROSPECTIVE, decoding)
        # a trained model keeps its start's settings; the threshold is given, as the test's spec may have another
        self.settings = {**(config.decoding or {}), "threshold": decoding.threshold}
        self.decoding = recorded(RETROSPECTIVE, decoding, self.seed)
        self.pictures = read_questions(config.pictures, self.image_root, fields=(), read=_asked)
        needed = config.rounds * (config.pictures_per_round or 0)
        if needed > len(self.pictures):
            raise UserError(
                f"`pictures_per_round`: {config.rounds} rounds of {config.pictures_per_round} take {needed} rows, and "
                f"{config.pictures} has {len(self.pictures)}. Lower it or `num_rounds`, or add pictures."
            )
        spec = load_spec(config.test_spec)
        if spec.judge is not None or spec.regions is not None:
            raise UserError(
                f"`test_spec`: {spec.name} asks a judge or is about boxes, and a round is measured by its answers' words. "
                "Name another spec."
            )
        self.metric = load_metric(spec.metric, spec.metric_options, config.test_data_dir)
        test = load_questions(spec, config.test_data_dir, self.metric, config.test_limit)
        self.test = {
            "spec": spec.name,
            "of_spec": digest(spec.to_json()),
            "questions": test.digest,
            "limit": config.test_limit,
        }
        self.test_images = test.image_root
        self._check_apart(test.rows)

    def _check_apart(self, test: Sequence[dict]) -> None:
        """Raises UserError: a picture of the test is also one to learn from."""
        learned = {locate(name, self.image_root) for row in self.pictures for name in row["images"]}
        for row in test:
            for name in row["images"]:
                if (path := locate(name, self.test_images)) in learned:
                    raise UserError(
                        f"{self.config.pictures}: {path} is a picture of the test too (question {row['id']!r} of "
                        f"{self.test['spec']}). Remove it from one of the two."
                    )

    def made_with(self, round_: int) -> dict[str, Any]:
        return {} if round_ == 0 else {"round_objective": self.config.round_objective}

    def round(self, round_: int) -> dict:
        self.claim(round_)
        if round_ > 0:
            self.train(round_, self.rows(round_))
        return self.measure(round_)

    def rows(self, round_: int) -> Path:
        """The folder with a round's pairs and finished answers, those of the model before it."""
        folder, model = self.folder(round_), self.model(round_ - 1)
        count = self.config.pictures_per_round
        rows = self.pictures[count * (round_ - 1) : count * round_] if count else self.pictures
        asked = folder / "pictures.jsonl"
        write_once(asked, rows)
        made_by = {
            "model": identity(model),
            "pictures": digest(rows),
            "decoding": self.decoding,
            "engine": self.engine,
            "seed": self._seed(round_),
        }
        processes = self.config.sample_processes
        job = {
            "model": self.source(round_, model),
            "rows": str(asked),
            "settings": self.settings,
            "seed": self._seed(round_),
            "shard_rows": min(SHARD_ROWS, -(-len(rows) // processes)),
        }
        answers = folder / "answers"
        self._do(round_, answers, "answer", job, made_by)
        target, settings = folder / "rows", self.config.pairs or {}
        run_stage(
            target,
            {"stage": "rows", "answers": made_by, "pairs": settings, **self.made_with(round_)},
            lambda: self._write_rows(round_, answers, target),
        )
        self.console.print(f"  rows: {in_words(read_json(self._counts(round_)))}", highlight=False)
        return target

    def _write_rows(self, round_: int, answers: Path, target: Path) -> None:
        pairs = target / "pairs.jsonl" if self.config.uses_dpo else None
        try:
            counts = write_pairs(answers, pairs, self.config.pair_config, target / "finished.jsonl")
        except NoPairs as error:
            raise UserError(
                f"round {round_}: {error} Or set `num_rounds: {round_ - 1}`, which ends with the model before this round."
            ) from error
        if "sft" in self.config.round_objective and FINISHED not in counts:
            raise UserError(
                f"round {round_}: none of {counts['answers']} answers was verified to its end, so there is nothing to "
                "imitate. Let `decoding` doubt less (a higher `threshold`), or set `round_objective: dpo`."
            )
        write_json(self._counts(round_), counts)

    def _seed(self, round_: int) -> int:
        return 1_000_003 * self.seed + 101 * round_

    def train(self, round_: int, rows: Path) -> None:
        folder, start = self.folder(round_), self.start(round_)
        if "sft" in self.config.round_objective:
            self.trainer.train("sft", folder / "train", rows / "finished.jsonl", start, self.console)
            start = str(folder / "train")
        if self.ends_with_dpo(round_):
            self.trainer.train("dpo", folder / "dpo", rows / "pairs.jsonl", start, self.console)

    def measure(self, round_: int) -> dict:
        """Answer the test both ways and read the start's answers; writes `metrics.json` of the round and returns it."""
        folder, model = self.folder(round_) / "test", self.model(round_)
        options = {"seed": self.seed, "rounds": self.config.bootstrap_rounds}
        made_by = {"model": identity(model), "test": self.test, "engine": self.engine, **options}
        job = {
            "model": self.source(round_, model),
            "spec": self.config.test_spec,
            "data_dir": self.config.test_data_dir,
            "limit": self.config.test_limit,
            **options,
        }
        for decoder, settings in ((GREEDY, {}), (RETROSPECTIVE, self.settings)):
            decoding = {"decoder": GREEDY} if decoder == GREEDY else self.decoding
            self._do(
                round_,
                folder / decoder,
                "evaluate",
                {**job, "decoder": decoder, "settings": settings},
                {**made_by, "decoding": decoding},
            )
        start = self.folder(0) / "test"
        if round_ > 0:
            reading = {"model": model, "samples": str(start / GREEDY), "images": str(self.test_images)}
            self._do(round_, folder / "reading", "read", reading, made_by)
        metrics = self._figures_of(round_, folder, start)
        write_json(self.folder(round_) / "metrics.json", metrics)
        self._show(metrics)
        before = [] if round_ == 0 else [read_json(self.folder(0) / "metrics.json")]
        self.warn(self.warnings([*before, metrics]))
        return metrics

    def _figures_of(self, round_: int, folder: Path, start: Path) -> dict:
        rounds, seed = self.config.bootstrap_rounds, self.seed
        summaries = {decoder: read_results(folder / decoder) for decoder in (GREEDY, RETROSPECTIVE)}
        names = ("metrics", "verifier", "cost", "verdicts")
        greedy, retrospective = ({name: summary[name] for name in names} for summary in summaries.values())
        before = read_samples(start / GREEDY)
        if round_ > 0:
            before = with_verdicts(_with_phrases(before), read_json(folder / "reading" / READING))
        at_start = verifier_summary(before, self.metric, rounds, seed)
        figures = {
            "round": round_,
            "n": summaries[GREEDY]["n"],
            **greedy.pop("metrics"),
            "verifier_auc": (greedy["verifier"] or {}).get("auc"),
            "verifier_auc_at_start": (at_start or {}).get("auc"),
            "doubted_at_start": self._doubted(before),
            **greedy,
            "retrospective": retrospective,
        }
        if round_ > 0:
            figures["minus_start"] = {
                decoder: self._minus(folder / decoder, start / decoder) for decoder in summaries
            }
        return figures

    def _doubted(self, samples: Sequence[dict]) -> dict[str, float | None]:
        """Shares of wrong and of right phrases with P(</UN>) above tau: the area does not tell whether all values sank."""
        phrases = [phrase for answer in phrase_verdicts(samples, self.metric) for phrase in answer.tolist()]
        shares = {}
        for name, verdict in (("wrong", 1.0), ("right", 0.0)):
            doubted = [p > self.settings["threshold"] for p, wrong in phrases if wrong == verdict]
            shares[name] = sum(doubted) / len(doubted) if doubted else None
        return shares

    def _minus(self, folder: Path, start: Path) -> dict:
        counts, before = (count_matrix(read_samples(f), self.metric) for f in (folder, start))
        statistics = self.metric.statistics
        return to_json(differences(counts, before, statistics, self.config.bootstrap_rounds, self.seed))

    def _show(self, metrics: dict) -> None:
        names = [*metrics["retrospective"]["metrics"], "verifier_auc_at_start"]
        figures = [f"{name} {metrics[name]['value']:.3f}" for name in names if metrics[name]]
        self.console.print(f"  test, greedy: {', '.join(figures)}", highlight=False)

    def warn(self, warnings: Sequence[str]) -> None:
        for warning in warnings:
            self.console.print(f"Warning: {warning}", style="yellow", markup=False, highlight=False)

    def warnings(self, rounds: Sequence[dict]) -> list[str]:
        """What is to be said of the verifier, and then of resampled answers, after each round."""
        return self._fallen(rounds) + [
            f"round {m['round']}: resampled answers are worse than the start's: {worse}. Where answers are to be resampled, "
            "take an earlier model."
            for m in rounds[1:]
            if (worse := self._worse(m["minus_start"][RETROSPECTIVE]))
        ]

    def _worse(self, minus_start: dict[str, dict]) -> str:
        """The figures whose whole interval is on the worse side."""
        judged = {k: gap for k, gap in minus_start.items() if k not in self.metric.neither_is_better}
        return ", ".join(
            f"{name} {interval_text(gap, sign='+')}"
            for name, gap in judged.items()
            if (gap["low"] > 0 if name in self.metric.lower_is_better else gap["high"] < 0)
        )

    def _fallen(self, rounds: Sequence[dict]) -> list[str]:
        area = rounds[0]["verifier_auc_at_start"]
        if area is None:
            return [
                f"The start's {rounds[0]['n']} answers have no wrong phrase, or no right one, so whether the verifier falls "
                "is not measured. Take more test questions."
            ]
        limit = self.config.verifier_fall
        return [
            f"round {m['round']}: the verifier's area at the start's phrases has fallen from {area['value']:.3f} to "
            f"{now['value']:.3f}, by more than `verifier_fall` ({limit:g}): resampling, and any further round, has less to "
            "work on. Take an earlier round's model; or train with `phrases_only: true` and a larger `verdict_weight` under "
            "`dpo`, or with fewer steps."
            for m in rounds[1:]
            if (now := m["verifier_auc_at_start"])["value"] < area["value"] - limit
        ]

    def figures(self, rounds: Sequence[dict]) -> dict[str, Any]:
        return {
            "spec": self.test["spec"],
            "rows": {m["round"]: read_json(self._counts(m["round"])) for m in rounds[1:]},
            "warnings": self.warnings(rounds),
        }

    def _counts(self, round_: int) -> Path:
        return self.folder(round_) / "rows" / "counts.json"

    def _do(self, round_: int, folder: Path, name: str, job: dict, made_by: dict) -> None:
        """A job of `JOBS` into a folder, in this process, on workers or in processes of its own."""
        job = {**job, "job": name, "label": f"round {round_}, {folder.name}"}

        def work() -> None:
            here = {"image_root": self.image_root, "folder": str(folder), "options": asdict(self.options)}
            if name != "read" and self.workers:
                JOBS[name](job | here, self.workers, self.console)
            elif self.in_process:
                JOBS[name](job | here, None, self.console)
            else:
                self.launch(folder, job)

        run_stage(folder, {"stage": name, **made_by}, work)


def _asked(raw: dict, where: str) -> dict:
    """What a row asks, without any truth that it may have."""
    row = asked_row(raw, where)
    return {name: row[name] for name in ("id", "images", "question")}


def _with_phrases(samples: Sequence[dict]) -> list[dict]:
    return [sample for sample in samples if sample["spans"]]


# --- What a round asks of a model, as `worker` does it too ---


def answer_pictures(job: dict, workers: Workers | None = None, console: Console | None = None) -> None:
    """Answers with their traces."""
    options = DecodeOptions(
        traces=True, image_root=job["image_root"], shard_rows=job["shard_rows"], **job["options"]
    )
    decode(
        job["rows"],
        job["folder"],
        job["model"],
        settings=job["settings"],
        seed=job["seed"],
        options=options,
        workers=workers,
        console=console,
    )


def answer_test(job: dict, workers: Workers | None = None, console: Console | None = None) -> None:
    """An evaluation by one decoder."""
    asked = {name: job[name] for name in ("limit", "seed", "rounds")}
    evaluate_spec(
        job["spec"],
        job["model"],
        output_dir=job["folder"],
        data_dir=job["data_dir"],
        decoder=job["decoder"],
        settings=job["settings"],
        options=EvalOptions(report=False, **asked, **job["options"]),
        workers=workers,
        console=console,
    )


def read_answers(job: dict, workers: Workers | None = None, console: Console | None = None) -> None:
    """P(</UN>) at the phrases of another model's answers, into `READING`; one process reads."""
    if process_share()[0] > 0:
        return
    options = EngineOptions(**job["options"])
    samples = _with_phrases(read_samples(job["samples"]))
    values = read_verdicts_of(job["model"], samples, job["images"], options)
    write_json(Path(job["folder"]) / READING, values)


def read_verdicts_of(
    model: str | Path, samples: Sequence[dict], image_root: str | Path, options: EngineOptions
) -> list[list[float]]:
    """P(</UN>) where each phrase of given answers closes, as a checkpoint reads it."""
    from ..methods import read_verdicts
    from ..models.load import load_for_inference

    loaded, processor, _ = load_for_inference(model, options.device, options.dtype)
    images = [[open_image(name, image_root) for name in sample["images"]] for sample in samples]
    return read_verdicts(loaded, processor, images, *said_before(samples), batch_size=options.side_by_side)


JOBS: dict[str, Callable[..., None]] = {
    "answer": answer_pictures,
    "evaluate": answer_test,
    "read": read_answers,
}
