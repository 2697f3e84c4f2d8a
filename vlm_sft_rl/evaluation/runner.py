"""`evaluate_spec`: a benchmark on a checkpoint -> samples.jsonl, summary.json and report.html in one folder."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from ..errors import UserError
from ..io import read_json, write_json
from ..runs import (
    BATCHES_PER_CALL,
    RUN_FILE,
    SAMPLES,
    SUMMARY,
    Engine,
    answer_all,
    claim,
    collect,
    model_digest,
    process_share,
    read_samples,
    shards,
    versions,
    wait_for,
)
from .baselines import MODES, derive
from .candidates import asks_itself, check_readable, chooser
from .decoders import DECODERS, check_model_folder, choose_threshold, load_generate, trace_writer
from .judge import JudgeSettings, judge_samples
from .metrics import load_metric
from .pages import published_tables, summary_table, write_eval_page
from .questions import Questions, load_questions, to_sample
from .regions import RegionSystem, region_settings
from .scoring import score
from .settings import decoder_settings
from .specs import EvalSpec, check_decoder, load_spec
from .turns import turn_summary

# (rows, images of each or None) -> what each was asked, and Answer.to_json() of each
Ask = Callable[[Sequence[dict], Sequence[list | None]], tuple[list[str], list[dict]]]


def _summary_over(output: Path, ids: Sequence[str], config: dict) -> dict | None:
    """The first process's summary of these answers; None before it is written.

    A summary that an earlier run left there counts only if it is what this run will write: over the same questions, by
    the same settings, and not older than the answers. The first process removes any other one, but maybe not yet.
    """
    path = output / SUMMARY
    try:
        if shards(output) or path.stat().st_mtime_ns < (output / SAMPLES).stat().st_mtime_ns:
            return None
        summary = read_json(path)
    except (FileNotFoundError, UserError):  # removed in this moment
        return None
    fits = summary.get("n") == len(ids) and summary.get("config") == json.loads(json.dumps(config))
    return summary if fits and collect(output).keys() >= set(ids) else None


def _load(spec: EvalSpec, questions: Questions, folder: Path, settings: dict, **options) -> Ask:
    """The checkpoint, loaded once, as the function that answers rows of this benchmark."""
    if spec.regions is not None:
        return RegionSystem(folder, settings, **options)
    generate, own = load_generate(folder, settings, **options), asks_itself(settings)

    def ask(rows, images):
        prompts = [own.ask(row) if own else questions.prompt(row, spec.prompt) for row in rows]
        return prompts, generate(images, prompts, [row["id"] for row in rows])

    return ask


def _model_engine(questions: Questions, ask: Ask, finish: Callable[[dict], dict]) -> Engine:
    def answer(rows: Sequence[dict]) -> Iterator[list[dict]]:
        prompts, answers = ask(rows, [questions.images(row) for row in rows])
        yield [finish(sample) for sample in map(to_sample, rows, prompts, answers)]

    return answer


def _derived_engine(greedy_run: Path, config: dict) -> Engine:
    """Samples of `drop` and `stop` from a finished greedy run on the same benchmark, checkpoint and token limit."""
    source = read_json(greedy_run / RUN_FILE)
    for key in ("spec", "questions", "model_digest"):
        if source.get(key) != config[key]:
            raise UserError(
                f"{greedy_run}: its {key} is not that of this evaluation, so it cannot be derived from."
            )
    before, settings = source["decoding"], config["decoding"]
    if before["decoder"] != "greedy" or before["max_new_tokens"] != settings["max_new_tokens"]:
        raise UserError(
            f"{greedy_run}: decoded by {before['decoder']} with max_new_tokens {before['max_new_tokens']}; needed is "
            f"greedy with {settings['max_new_tokens']}."
        )
    greedy = {sample["id"]: sample for sample in read_samples(greedy_run)}

    def answer(rows: Sequence[dict]) -> Iterator[list[dict]]:
        missing = [row["id"] for row in rows if row["id"] not in greedy]
        if missing:
            raise UserError(
                f"{greedy_run}: has no answer to {len(missing)} questions, first {missing[0]!r}. Finish that run first."
            )
        yield [derive(greedy[row["id"]], settings["decoder"], settings["threshold"]) for row in rows]

    return answer


def evaluate_spec(
    spec: EvalSpec | str | Path,
    model: str | Path,
    *,
    decoder: str = "greedy",
    output_dir: str | Path,
    data_dir: str | Path,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    threshold: float | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    retrospective: dict | None = None,
    correction: dict | None = None,
    candidates: dict | None = None,
    opera: dict | None = None,
    rounds: int = 100,
    greedy_run: str | Path | None = None,
    judge: JudgeSettings | None = None,
    answers_only: bool = False,
    overwrite: bool = False,
    report: bool = True,
    device: str | None = None,
    dtype: str = "auto",
    console: Console | None = None,
) -> dict:
    """Run one benchmark and return its summary. Run again to go on after an interruption, or with a higher `limit`.

    Started under `accelerate launch` or `torchrun`, each process answers its share and the first one merges.

    Args:
        spec: a spec, or the name or path of one.
        model: a checkpoint or adapter folder.
        decoder: `greedy`, `sample`, `retrospective`, the training-free `vcd`, `dola` and `opera`, `correct` (an answer, then
            corrections of it), those that draw candidates (`candidates.REFLECTING`, `candidates.SEARCHING`), or, from one
            greedy run, `drop` (every phrase with P(</UN>) > threshold is left out) and `stop` (the answer ends before
            the first).
        output_dir: samples.jsonl, summary.json, report.html and run.json go there.
        data_dir: the folder that the spec's paths are relative to.
        limit: only the first questions.
        seed: of the sampling and of the bootstrap.
        batch_size: answers decoded side by side; no effect on the answers.
        threshold: tau on P(</UN>); default the spec's for this family, then the checkpoint's own.
        max_new_tokens, temperature: default the spec's; the temperature is that of `sample`, or the start of
            `retrospective`.
        retrospective: further fields of `RetrospectiveConfig`.
        correction: further fields of `CorrectionConfig`.
        candidates: fields of `CandidateConfig` over the spec's.
        opera: fields of `OperaConfig` over the published ones.
        rounds: bootstrap resamples.
        greedy_run: for `drop` and `stop`: the folder of a greedy run on this benchmark to derive from, so that
            nothing is generated again.
        judge: for specs with a judge: which model, where.
        answers_only: for specs with a judge: stop when all answers are made; a later call judges them.
        overwrite: throw away what another configuration left in `output_dir`.
        report: write report.html.

    Raises:
        UserError: a file or an image is missing, tau is outside (0, 1), the checkpoint has no verification tokens
            although the decoder needs them, a vote is asked for where no answers can be read, or `output_dir` belongs
            to another configuration.
    """
    if decoder not in DECODERS:
        raise UserError(f"--decoder {decoder!r} does not exist. Decoders: {', '.join(DECODERS)}.")
    if batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, found {batch_size}.")
    if greedy_run is not None and decoder not in MODES:
        raise UserError(f"a greedy run can be reused by --decoder drop and stop only, not by {decoder}.")
    rank, _ = process_share()
    console = console or Console(quiet=rank > 0)
    spec = spec if isinstance(spec, EvalSpec) else load_spec(spec)
    if spec.regions is not None:
        check_decoder(spec.regions, decoder)
    folder, output = check_model_folder(model), Path(output_dir)
    tau = choose_threshold(spec, folder, decoder, threshold)
    settings = decoder_settings(
        spec,
        folder,
        decoder,
        seed,
        tau,
        max_new_tokens,
        temperature,
        retrospective or {},
        correction or {},
        candidates or {},
        opera or {},
    )
    if spec.regions is not None:
        settings["regions"] = region_settings(spec.regions, folder)
    metric = load_metric(spec.metric, spec.metric_options, data_dir)
    check_readable(decoder, settings, metric, spec.name)
    if spec.judge is not None and judge is None and not answers_only:
        raise UserError(
            f"{spec.name}: a language model judges the answers. Name it with --judge-url and --judge-model (any "
            "OpenAI-compatible endpoint), or make the answers now with --answers-only and run again with a judge later."
        )
    if spec.judge is None and (judge is not None or answers_only):
        raise UserError(
            f"{spec.name}: no judge is asked here, so the judge's options have no effect: leave them out."
        )
    questions = load_questions(spec, data_dir, metric, limit)
    config = {
        # a judge comes after the answers: they stay valid under another one
        "spec": {key: value for key, value in spec.to_json().items() if key != "judge"},
        "questions": questions.digest,
        "model": str(folder.resolve()),
        "model_digest": model_digest(folder),
        "decoding": settings,
    }
    started = time.monotonic()
    run = claim(output, config, overwrite=overwrite)
    if rank == 0:
        (output / SUMMARY).unlink(missing_ok=True)

    def load() -> Engine:
        if greedy_run is not None:
            return _derived_engine(Path(greedy_run), config)
        ask = _load(spec, questions, folder, settings, batch_size=batch_size, device=device, dtype=dtype)
        finish = (
            (lambda sample: derive(sample, decoder, tau))
            if decoder in MODES
            else chooser(settings, metric) or (lambda sample: sample)
        )
        return _model_engine(questions, ask, finish)

    per_call = len(questions.rows) if greedy_run is not None else BATCHES_PER_CALL * batch_size
    samples, answered_now = answer_all(run, questions.rows, load, per_call=per_call, console=console)
    ids = [row["id"] for row in questions.rows]
    shown = settings | {
        "rounds": rounds,
        "level": 0.95,
        "limit": limit,
        "model_digest": config["model_digest"],
        "data_dir": str(Path(data_dir).resolve()),
    }
    if rank > 0:
        if answers_only:
            return {"spec": spec.name, "n": len(ids), "answered_now": answered_now}
        return wait_for(
            lambda: _summary_over(output, ids, shown), f"{output}: the first process wrote no {SUMMARY}"
        )
    if answers_only:
        console.print(f"{len(samples)} answers, not judged yet, written to {output}", highlight=False)
        return {"spec": spec.name, "n": len(samples), "answered_now": answered_now}
    judged = {}
    if spec.judge is not None:
        judged = {"judge": judge_samples(samples, spec, judge, output, console)}
    summary = {
        "spec": spec.name,
        "description": spec.description,
        "model": str(model),
        "decoder": decoder,
        "threshold": tau,
        **score(samples, metric, rounds, seed),
        **({"corrections": turn_summary(samples, metric, rounds, seed)} if decoder == "correct" else {}),
        **judged,
        "published": spec.to_json()["published"],
        "config": shown,
        "seed": seed,
        "versions": versions(),
        "seconds": round(time.monotonic() - started, 2),
        "answered_now": answered_now,
    }
    write_json(output / SUMMARY, summary)
    if report:
        link = trace_writer(output, questions.image_root)
        write_eval_page(output / "report.html", summary, samples, metric, questions.image_root, link=link)
    console.print(summary_table(summary, metric.lower_is_better).terminal())
    for table in published_tables(summary):
        console.print(dataclasses.replace(table, note="").terminal())
    console.print(f"Written to {output}", highlight=False)
    return summary
