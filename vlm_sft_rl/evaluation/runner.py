"""`evaluate_spec`: a benchmark on a checkpoint -> samples.jsonl, summary.json and report.html in one folder."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import UserError, printable
from ..io import write_json
from ..runs import (
    BATCHES_PER_CALL,
    SAMPLES,
    SUMMARY,
    answer_all,
    claim,
    collect,
    model_digest,
    shards,
    versions,
    wait_for,
)
from ..shapes import read_object
from ..workers import Engine, Workers, process_share
from .decoders import (
    DECODERS,
    DecoderConfig,
    answer_batch,
    check_decoder,
    check_engine,
    check_model_folder,
    check_readable,
    configure,
    model_type,
    recorded,
    trace_writer,
)
from .judge import judge_samples
from .metrics import load_metric
from .metrics.counting import CountMetric
from .pages import candidate_tables, published_tables, summary_table, write_eval_page
from .questions import Questions, check_answered, load_questions, to_sample
from .regions import RegionSystem, region_settings
from .results import SAMPLE, read_manifest, read_samples
from .scoring import score, verdict_counts
from .specs import EvalOptions, EvalSpec, JudgeSettings, check_task, load_spec
from .turns import turn_summary
from .votes import by_count

# (rows, images of each or None) -> what each was asked, and Answer.to_json() of each
System = Callable[[Sequence[dict], Sequence[list | None]], tuple[list[str], list[dict]]]


def evaluate_spec(
    spec: EvalSpec | str | Path,
    model: str | Path,
    *,
    output_dir: str | Path,
    data_dir: str | Path,
    decoder: str = "greedy",
    settings: Mapping[str, Any] | None = None,
    options: EvalOptions | None = None,
    judge: JudgeSettings | None = None,
    workers: Workers | None = None,
    console: Console | None = None,
) -> dict:
    """Run one benchmark and return its summary. Run again to go on after an interruption, or with a higher `limit`.

    Started under `accelerate launch` or `torchrun`, each process answers its share and the first one merges.

    Args:
        spec: a spec, or the name or path of one.
        model: a checkpoint or adapter folder.
        output_dir: samples.jsonl, summary.json, report.html and run.json go there.
        data_dir: the folder that the spec's paths are relative to.
        decoder: a name of `DECODERS`.
        settings: fields of the decoder's config, over those of the checkpoint and the spec.
        judge: for specs with a judge: which model, where.
        workers: those of a Ray cluster that answer, in place of this process.

    Raises UserError: a file or an image is missing, a setting is out of range or without effect, the checkpoint lacks what
    the decoder needs, a vote is asked for where no answers can be read, or `output_dir` belongs to another configuration.
    """
    started, options = time.monotonic(), options or EvalOptions()
    rank, _ = process_share()
    console = console or Console(quiet=rank > 0)
    spec = spec if isinstance(spec, EvalSpec) else load_spec(spec)
    _check_judge(spec, judge, options)
    if workers is not None and options.greedy_run is not None:
        raise UserError("--greedy-run asks no model, so there is nothing for workers to do: leave --ray out.")
    evaluation = _prepare(spec, model, data_dir, decoder, settings or {}, options)
    output, questions, manifest = Path(output_dir), evaluation.questions, evaluation.manifest
    run = claim(output, manifest, SAMPLE, overwrite=options.overwrite)
    check_answered(questions, run.answers, output)
    if rank == 0:
        (output / SUMMARY).unlink(missing_ok=True)
    per_call = len(questions.rows) if options.greedy_run else BATCHES_PER_CALL * options.side_by_side
    samples, answered_now = answer_all(
        run,
        questions.rows,
        evaluation.load,
        per_call=per_call,
        open=None if options.greedy_run else evaluation.open,
        workers=workers,
        console=console,
    )
    ids = [row["id"] for row in questions.rows]
    if options.answers_only:
        if rank == 0:
            console.print(f"{len(samples)} answers, not judged yet, written to {output}", markup=False)
        return {"spec": spec.name, "n": len(ids), "answered_now": answered_now}
    shown = {
        **evaluation.decoding,
        "engine": evaluation.engine,
        "rounds": options.rounds,
        "level": 0.95,
        "limit": options.limit,
        "model_digest": manifest["model_digest"],
        "data_dir": str(Path(data_dir).resolve()),
    }
    if rank > 0:
        return wait_for(
            lambda: _summary_over(output, ids, shown), f"{output}: the first process wrote no {SUMMARY}"
        )
    verdicts = {}
    if judge is not None:
        verdicts["judge"] = judge_samples(samples, spec, evaluation.metric, judge, output, console)
    summary = {
        "spec": spec.name,
        "description": spec.description,
        "model": str(model),
        **evaluation.scores(samples),
        **verdicts,
        "published": spec.to_json()["published"],
        "config": shown,
        "seed": options.seed,
        "versions": versions(),
        "seconds": round(time.monotonic() - started, 2),
        "answered_now": answered_now,
    }
    write_json(output / SUMMARY, summary)
    _show(summary, samples, evaluation, output, console)
    return summary


@dataclass
class _Evaluation:
    """A checkpoint, what it is asked, how it answers, and how that is scored."""

    spec: EvalSpec
    folder: Path
    decoder: str
    config: DecoderConfig
    decoding: dict[str, Any]  # what is recorded of the decoder
    engine: str  # and of what computes
    metric: CountMetric
    questions: Questions
    options: EvalOptions

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """All that decides the answers."""
        return {
            # a judge comes after the answers: they stay valid under another one
            "spec": {key: value for key, value in self.spec.to_json().items() if key != "judge"},
            "questions": self.questions.digest,
            "model": str(self.folder.resolve()),
            "model_digest": model_digest(self.folder),
            "decoding": self.decoding,
            "engine": self.engine,
        }

    def load(self) -> Engine:
        """What answers the questions: the checkpoint, or a greedy run of it."""
        options = self.options
        if options.greedy_run is not None:
            return _greedy_engine(Path(options.greedy_run), self.manifest, self.questions, self.revise)
        loaded = options.load(self.folder)
        decoder = DECODERS[self.decoder]
        answer = partial(answer_batch, loaded, decoder, self.config, batch_size=options.side_by_side)
        if self.spec.regions is not None:
            system = RegionSystem(loaded, self.decoding, answer, options.side_by_side)
        else:
            system = _question_system(self.spec, self.questions, self.config, answer)

        def answer_rows(opened: Sequence[dict]) -> Iterator[list[dict]]:
            rows = [item["row"] for item in opened]
            prompts, answers = system(rows, [item["pictures"] for item in opened])
            yield [self.revise(sample) for sample in map(to_sample, rows, prompts, answers)]

        return answer_rows

    def open(self, row: dict) -> dict:
        return {"row": row, "pictures": self.questions.images(row)}

    def revise(self, sample: dict) -> dict:
        change = DECODERS[self.decoder].revise
        return sample if change is None else change(sample, self.config, self.metric)

    def scores(self, samples: list[dict]) -> dict[str, Any]:
        """The figures of the answers, for summary.json."""
        rounds, seed = self.options.rounds, self.options.seed
        needs_tags = DECODERS[self.decoder].needs_tags
        drafts = {}
        if self.decoder == "correct":
            drafts = {"corrections": turn_summary(samples, self.metric, rounds, seed)}
        elif self.decoder == "majority":
            drafts = {"candidates": by_count(samples, self.metric, rounds, seed)}
        return {
            "decoder": self.decoder,
            "threshold": self.config.threshold if needs_tags else None,
            **score(samples, self.metric, rounds, seed),
            "verdicts": verdict_counts(samples) if needs_tags else None,
            **drafts,
        }


def _prepare(
    spec: EvalSpec,
    model: str | Path,
    data_dir: str | Path,
    decoder: str,
    settings: Mapping[str, Any],
    options: EvalOptions,
) -> _Evaluation:
    """Everything that can be wrong is looked at here, before any weight is read."""
    check_decoder(decoder)
    if options.greedy_run is not None and decoder not in ("drop", "stop"):
        raise UserError(f"a greedy run can be reused by --decoder drop and stop only, not by {decoder}.")
    if spec.regions is not None:
        check_task(spec.regions, decoder)
    folder = check_model_folder(model)
    defaults = spec.decoding.settings_for(decoder, model_type(folder))
    config = configure(decoder, folder, settings, spec=defaults, seed=options.seed)
    engine = check_engine(options.engine, decoder, config)
    if options.greedy_run is not None:
        engine = read_manifest(Path(options.greedy_run)).get("engine", engine)
    if options.engine == "vllm" and spec.regions is not None and spec.regions.locates:
        raise UserError(
            f"{spec.name}: boxes are located on cached keys, which --engine vllm does not give. Use --engine hf."
        )
    decoding = recorded(decoder, config, options.seed)
    if spec.regions is not None:
        decoding["regions"] = region_settings(spec.regions, folder)
    metric = load_metric(spec.metric, spec.metric_options, data_dir)
    check_readable(config, metric, spec.name)
    questions = load_questions(spec, data_dir, metric, options.limit)
    return _Evaluation(spec, folder, decoder, config, decoding, engine, metric, questions, options)


def _check_judge(spec: EvalSpec, judge: JudgeSettings | None, options: EvalOptions) -> None:
    if spec.judge is not None and judge is None and not options.answers_only:
        raise UserError(
            f"{spec.name}: a language model judges the answers. Name it with --judge-url and --judge-model (any "
            "OpenAI-compatible endpoint), or make the answers now with --answers-only and run again with a judge later."
        )
    if spec.judge is None and (judge is not None or options.answers_only):
        raise UserError(
            f"{spec.name}: no judge is asked here, so the judge's options have no effect: leave them out."
        )


def _show(
    summary: dict, samples: list[dict], evaluation: _Evaluation, output: Path, console: Console
) -> None:
    metric, image_root = evaluation.metric, evaluation.questions.image_root
    if evaluation.options.report:
        link = trace_writer(output, image_root, summary["threshold"])
        write_eval_page(output / "report.html", summary, samples, metric, image_root, link=link)
    console.print(summary_table(summary, metric.lower_is_better).terminal())
    for table in [*candidate_tables(summary), *published_tables(summary)]:
        console.print(replace(table, note="").terminal())
    console.print(f"Written to {printable(str(output))}", markup=False, highlight=False)


def _question_system(
    spec: EvalSpec, questions: Questions, config: DecoderConfig, answer: Callable[..., list[dict]]
) -> System:
    # the prompts of a data set replace the spec's
    texts = config.texts() if getattr(config, "prompts", None) else None

    def ask(rows: Sequence[dict], images: Sequence[list | None]) -> tuple[list[str], list[dict]]:
        prompts = [texts.ask(row) if texts else questions.prompt(row) for row in rows]
        return prompts, answer(images, prompts, [row["id"] for row in rows])

    return ask


def _greedy_engine(
    greedy_run: Path, manifest: dict, questions: Questions, revise: Callable[[dict], dict]
) -> Engine:
    """Answers of a finished greedy run on the same benchmark, checkpoint and token limit, revised."""
    source = read_manifest(greedy_run)
    for key in ("spec", "questions", "model_digest"):
        if source[key] != manifest[key]:
            raise UserError(
                f"{greedy_run}: its {key} is not that of this evaluation, so it cannot be derived from."
            )
    before, tokens = source["decoding"], manifest["decoding"]["max_new_tokens"]
    if before["decoder"] != "greedy" or before["max_new_tokens"] != tokens:
        raise UserError(
            f"{greedy_run}: decoded by {before['decoder']} with max_new_tokens {before['max_new_tokens']}; needed is "
            f"greedy with {tokens}."
        )
    greedy = {sample["id"]: sample for sample in read_samples(greedy_run)}
    check_answered(questions, greedy, greedy_run)

    def answer(rows: Sequence[dict]) -> Iterator[list[dict]]:
        missing = [row["id"] for row in rows if row["id"] not in greedy]
        if missing:
            raise UserError(
                f"{greedy_run}: has no answer to {len(missing)} questions, first {missing[0]!r}. Finish that run first."
            )
        yield [revise(greedy[row["id"]]) for row in rows]

    return answer


def _summary_over(output: Path, ids: Sequence[str], config: dict) -> dict | None:
    """The first process's summary of these answers; None before it is written.

    A summary that an earlier run left there counts only if it is what this run will write: over the same questions, by
    the same settings, and not older than the answers. The first process removes any other one, but maybe not yet.
    """
    path = output / SUMMARY
    try:
        if shards(output) or path.stat().st_mtime_ns < (output / SAMPLES).stat().st_mtime_ns:
            return None
        summary = read_object(path, dict, "")
    except (FileNotFoundError, UserError):  # removed in this moment
        return None
    fits = summary.get("n") == len(ids) and summary.get("config") == json.loads(json.dumps(config))
    return summary if fits and collect(output).keys() >= set(ids) else None
