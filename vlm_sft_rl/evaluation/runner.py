"""`evaluate_spec`: a benchmark on a checkpoint -> samples.jsonl, summary.json and report.html in one folder."""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import UserError
from ..io import append_jsonl, read_json, write_json
from ..runs import RUN_FILE, claim, is_claimed, model_digest, versions
from .baselines import MODES, derive
from .candidates import asks_itself, check_readable, chooser
from .decoders import DECODERS, check_model_folder, choose_threshold, load_generate, trace_writer
from .judge import JudgeSettings, judge_samples
from .metrics import load_metric
from .questions import Questions, load_questions
from .regions import RegionSystem, region_settings
from .samples import SAMPLES, collect, cut_broken_end, merge, read_samples, shard_path, shards, to_sample
from .scoring import score
from .settings import decoder_settings
from .specs import EvalSpec, check_decoder, load_spec
from .tables import published_category_table, published_table, summary_table
from .turns import turn_summary

SUMMARY = "summary.json"
_POLL_SECONDS = 0.5
_BATCHES_PER_CALL = 4
T = TypeVar("T")
# (rows, images of each or None) -> what each was asked, and Answer.to_json() of each
Ask = Callable[[Sequence[dict], Sequence[list | None]], tuple[list[str], list[dict]]]


def _wait_for(attempt: Callable[[], T | None], failure: str, timeout: float = math.inf) -> T:
    """Poll until `attempt` gives something. Without a limit where a process may work for hours: the launcher ends
    all processes when one fails."""
    started = time.monotonic()
    while (result := attempt()) is None:
        if time.monotonic() - started > timeout:
            raise UserError(f"{failure} within {timeout:.0f} s. Look at the messages of the other processes.")
        time.sleep(_POLL_SECONDS)
    return result


def _claim_folder(output: Path, config: dict, rank: int, world_size: int, overwrite: bool) -> None:
    if overwrite and world_size > 1:
        raise UserError(
            f"--overwrite works in a single process only. Remove {output} and start again without it."
        )
    if rank == 0:
        claim(output, config, overwrite=overwrite)
        (output / SUMMARY).unlink(missing_ok=True)
    else:
        _wait_for(lambda: is_claimed(output, config), f"{output}: the first process did not claim it", 600)


def _unanswered(rows: list[dict], output: Path, rank: int, world_size: int) -> list[dict]:
    """This process's share of the questions without those already answered."""
    cut_broken_end(shard_path(output, rank, world_size))
    answered = collect(output)
    return [row for row in rows[rank::world_size] if row["id"] not in answered]


def _complete(output: Path, ids: Sequence[str]) -> dict[str, dict] | None:
    found = collect(output)
    return found if found.keys() >= set(ids) else None


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
    return summary if fits and _complete(output, ids) is not None else None


def _answer_all(
    todo: list[dict],
    questions: Questions,
    ask: Ask,
    finish: Callable[[dict], dict],
    batch_size: int,
    path: Path,
    console: Console,
) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    # the engine replaces finished rows at once, so a few batches a call keep it full; a killed run loses one call
    rows_per_call = _BATCHES_PER_CALL * batch_size
    started = time.monotonic()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("answers", total=len(todo), rate="")
        for start in range(0, len(todo), rows_per_call):
            rows = todo[start : start + rows_per_call]
            prompts, answers = ask(rows, [questions.images(row) for row in rows])
            append_jsonl(path, map(finish, map(to_sample, rows, prompts, answers)))
            rate = (start + len(rows)) / (time.monotonic() - started)
            progress.update(task, advance=len(rows), rate=f"{rate:.1f}/s")


def _load(spec: EvalSpec, questions: Questions, folder: Path, settings: dict, **options) -> Ask:
    """The checkpoint, loaded once, as the function that answers rows of this benchmark."""
    if spec.regions is not None:
        return RegionSystem(folder, settings, **options)
    generate, own = load_generate(folder, settings, **options), asks_itself(settings)

    def ask(rows, images):
        prompts = [own.ask(row) if own else questions.prompt(row, spec.prompt) for row in rows]
        return prompts, generate(images, prompts, [row["id"] for row in rows])

    return ask


def _derive_all(todo: list[dict], config: dict, greedy_run: Path, path: Path) -> None:
    """Samples of `drop` and `stop` from a finished greedy run on the same benchmark, checkpoint and token limit."""
    made_by = read_json(greedy_run / RUN_FILE)
    for key in ("spec", "questions", "model_digest"):
        if made_by.get(key) != config[key]:
            raise UserError(
                f"{greedy_run}: its {key} is not that of this evaluation, so it cannot be derived from."
            )
    theirs, ours = made_by["decoding"], config["decoding"]
    if theirs["decoder"] != "greedy" or theirs["max_new_tokens"] != ours["max_new_tokens"]:
        raise UserError(
            f"{greedy_run}: decoded by {theirs['decoder']} with max_new_tokens {theirs['max_new_tokens']}; needed is "
            f"greedy with {ours['max_new_tokens']}."
        )
    greedy = {sample["id"]: sample for sample in read_samples(greedy_run)}
    missing = [row["id"] for row in todo if row["id"] not in greedy]
    if missing:
        raise UserError(
            f"{greedy_run}: has no answer to {len(missing)} questions, first {missing[0]!r}. Finish that run first."
        )
    derived = [derive(greedy[row["id"]], ours["decoder"], ours["threshold"]) for row in todo]
    append_jsonl(path, derived)


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
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
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
    _claim_folder(output, config, rank, world_size, overwrite)
    ids = [row["id"] for row in questions.rows]
    todo = _unanswered(questions.rows, output, rank, world_size)
    own_file = shard_path(output, rank, world_size)
    if greedy_run is not None:
        _derive_all(todo, config, Path(greedy_run), own_file)
    elif todo:
        ask = _load(spec, questions, folder, settings, batch_size=batch_size, device=device, dtype=dtype)
        finish = (
            (lambda sample: derive(sample, decoder, tau))
            if decoder in MODES
            else chooser(settings, metric) or (lambda sample: sample)
        )
        _answer_all(todo, questions, ask, finish, batch_size, own_file, console)
    shown = settings | {
        "rounds": rounds,
        "level": 0.95,
        "limit": limit,
        "model_digest": config["model_digest"],
        "data_dir": str(Path(data_dir).resolve()),
    }
    if rank > 0:
        if answers_only:
            return {"spec": spec.name, "n": len(ids), "answered_now": len(todo)}
        return _wait_for(
            lambda: _summary_over(output, ids, shown), f"{output}: the first process wrote no {SUMMARY}"
        )
    samples = merge(
        output, ids, _wait_for(lambda: _complete(output, ids), f"{output}: another process stopped")
    )
    if answers_only:
        console.print(f"{len(samples)} answers, not judged yet, written to {output}", highlight=False)
        return {"spec": spec.name, "n": len(samples), "answered_now": len(todo)}
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
        "answered_now": len(todo),
    }
    write_json(output / SUMMARY, summary)
    if report:
        from .eval_report import write_eval_report

        link = trace_writer(output, questions.image_root)
        write_eval_report(output / "report.html", summary, samples, metric, questions.image_root, link=link)
    console.print(summary_table(summary, metric.lower_is_better))
    for quoted in (published_table(summary), published_category_table(summary)):
        if quoted is not None:
            console.print(quoted)
    console.print(f"Written to {output}", highlight=False)
    return summary
