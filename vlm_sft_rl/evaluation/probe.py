"""A look at the verifier while it is trained: does P(</UN>) rank the model's own wrong phrases above its right ones?"""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback

from ..errors import UserError
from ..io import write_jsonl
from ..shapes import read_lines
from .metrics import load_metric
from .questions import load_questions, to_sample
from .results import SAMPLE
from .scoring import said_before, verifier_summary, with_verdicts
from .specs import load_spec

START = "probe_start.jsonl"  # what the model answered before its first step

logger = logging.getLogger(__name__)


class VerifierProbe(TrainerCallback):
    """Every `every` steps the model answers the questions greedily; its phrases are graded and their ROC area is logged.

    Logged: `verifier_auc` (absent while all phrases are right, or all wrong), `verifier_p_wrong` and
    `verifier_p_right`, the mean P(</UN>) on wrong and on right phrases. A model that errs less has fewer and harder errors
    left, so this area falls although the verifier is no worse. With `fall` the answers from before the first step are kept
    (`probe_start.jsonl` in the output folder) and read again every time: `verifier_auc_at_start`, the area at phrases that
    stay the same. Where it has fallen by more than `fall` at the end of training, a warning says so.

    Args:
        log: takes the figures; they belong into the record of the current step.
        generate: `(model, images, prompts, max_new_tokens) -> answers` (decoding's `Answer`s), greedy.
        spec: name or path of an eval spec whose metric judges phrases.
        data_dir: folder the spec's files are in.
        questions: questions file other than the spec's (a validation split).
        fall: largest fall of `verifier_auc_at_start`. None: it is not measured.
        read: `(model, images, prompts, tagged answers) -> P(</UN>) at the closing tags of each`; needed with `fall`.

    Raises UserError: the questions or their images are missing; training is sharded (the probe generates on one process); or
        a resumed run asks other questions than were answered before the first step.
    """

    def __init__(
        self,
        log: Callable[[dict], None],
        generate: Callable[..., list],
        spec: str,
        data_dir: str | Path,
        *,
        questions: str | None = None,
        every: int = 100,
        limit: int = 64,
        fall: float | None = None,
        read: Callable[..., list[list[float]]] | None = None,
    ):
        if every < 1 or limit < 1:
            raise UserError(f"probe_every and probe_limit must be at least 1, found {every} and {limit}.")
        self._log, self._generate, self._every = log, generate, every
        self._fall, self._read = fall, read
        # questions with their answers from before the first step, and the area at these answers then
        self._start: list[tuple[dict, dict]] = []
        self._area: float | None = None
        self._last: tuple[int, float] | None = None  # step and area of the last probe
        loaded = load_spec(spec)
        if questions:
            loaded = dataclasses.replace(loaded, questions=questions)
        self._metric = load_metric(loaded.metric, loaded.metric_options)
        self._questions = load_questions(loaded, data_dir, self._metric, limit)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if args.deepspeed or args.fsdp:
            raise UserError(
                "probe_spec needs the whole model on one process and does not work with FSDP or DeepSpeed: leave it out "
                "and evaluate the checkpoints instead."
            )
        if self._fall is not None and state.is_world_process_zero:
            self._keep_start(Path(args.output_dir) / START, model, state.global_step)

    def _keep_start(self, path: Path, model, step: int) -> None:
        if step == 0:
            write_jsonl(path, self._answer(model))
        if not path.exists():
            logger.warning(
                "%s is not there, so how far the verifier has fallen since the start is not measured.", path
            )
            return
        rows = self._questions.rows
        cure = (
            "Remove the file to go on: how far the verifier has fallen since the start is not measured then."
        )
        samples = list(read_lines(path, SAMPLE, cure, "id"))
        asked = [(row["id"], self._questions.prompt(row)) for row in rows]
        if asked != [(sample["id"], sample["prompt"]) for sample in samples]:
            raise UserError(
                f"{path}: the {len(samples)} questions answered before training are not the {len(rows)} of this run. Set "
                f"`probe_spec`, `probe_questions` and `probe_limit` as they were. {cure}"
            )
        self._start = [(row, sample) for row, sample in zip(rows, samples, strict=True) if sample["spans"]]
        self._area = self._area_of([sample for _, sample in self._start])

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self._every == 0 and state.is_world_process_zero:
            figures = self.measure(model, state.global_step)
            if figures:
                self._log(figures)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self._area is None:
            return
        # the best checkpoint may have been loaded since the last step
        fresh = self._last is None or self._last[0] != state.global_step or args.load_best_model_at_end
        area = self._area_at_start(model) if fresh else self._last[1]
        count = len(self._start)
        text = f"the verifier's area at {count} answers from before training: {self._area:.3f} then, {area:.3f} now"
        if area < self._area - self._fall:
            logger.warning(
                "%s. It has fallen by more than `probe_fall` (%g): resampling has less to work on. Do not use this "
                "checkpoint with it; train with `phrases_only: true`, a larger `verdict_weight`, or fewer steps.",
                text,
                self._fall,
            )
        else:
            logger.info("%s.", text)

    def measure(self, model, step: int) -> dict[str, float]:
        """The figures now, behind this step; the model is left in the mode it was in."""
        summary = verifier_summary(self._answer(model), self._metric, rounds=10) or {}
        if self._area is not None:
            self._last = step, self._area_at_start(model)
        figures = {
            "verifier_p_wrong": summary.get("mean_p_unconfident_wrong"),
            "verifier_p_right": summary.get("mean_p_unconfident_right"),
            "verifier_auc": _area(summary),
            "verifier_auc_at_start": None if self._last is None else self._last[1],
        }
        return {name: round(value, 4) for name, value in figures.items() if value is not None}

    def _answer(self, model) -> list[dict]:
        questions = self._questions
        prompts = [questions.prompt(row) for row in questions.rows]
        images = [questions.images(row) for row in questions.rows]
        answers = self._evaluating(
            model, self._generate, images, prompts, questions.spec.decoding.max_new_tokens
        )
        return [
            to_sample(row, prompt, answer.to_json())
            for row, prompt, answer in zip(questions.rows, prompts, answers, strict=True)
        ]

    def _area_at_start(self, model) -> float:
        rows, samples = zip(*self._start, strict=True)
        images = [self._questions.images(row) for row in rows]
        prompts, texts = said_before(samples)
        values = self._evaluating(model, self._read, images, prompts, texts)
        return self._area_of(with_verdicts(samples, values))

    def _area_of(self, samples: list[dict]) -> float | None:
        return _area(verifier_summary(samples, self._metric, rounds=10))

    @staticmethod
    def _evaluating(model, function: Callable, *arguments):
        training = model.training
        model.eval()
        try:
            return function(model, *arguments)
        finally:
            model.train(training)


def _area(summary: dict | None) -> float | None:
    return ((summary or {}).get("auc") or {}).get("value")
