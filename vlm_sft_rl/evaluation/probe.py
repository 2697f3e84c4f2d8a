"""A look at the verifier while it is trained: does P(</UN>) rank the model's own wrong phrases above its right ones?"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback

from ..errors import UserError
from .metrics import load_metric
from .questions import load_questions, to_sample
from .scoring import verifier_summary
from .specs import load_spec


class VerifierProbe(TrainerCallback):
    """Every `every` steps the model answers the questions greedily; its phrases are graded and their ROC area is logged.

    Logged: `verifier_auc` (absent while all phrases are right, or all wrong), `verifier_p_wrong` and
    `verifier_p_right`, the mean P(</UN>) on wrong and on right phrases.

    Args:
        log: takes the figures; they belong into the record of the current step.
        generate: `(model, images, prompts, max_new_tokens) -> answers` (decoding's `Answer`s), greedy.
        spec: name or path of an eval spec whose metric judges phrases.
        data_dir: folder the spec's files are in.
        questions: questions file other than the spec's (a validation split).

    Raises UserError: the questions or their images are missing, or training is sharded (the probe generates on one process).
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
    ):
        if every < 1 or limit < 1:
            raise UserError(f"probe_every and probe_limit must be at least 1, found {every} and {limit}.")
        self._log, self._generate, self._every = log, generate, every
        loaded = load_spec(spec)
        if questions:
            loaded = dataclasses.replace(loaded, questions=questions)
        self._metric = load_metric(loaded.metric, loaded.metric_options)
        self._questions = load_questions(loaded, data_dir, self._metric, limit)

    def on_train_begin(self, args, state, control, **kwargs):
        if args.deepspeed or args.fsdp:
            raise UserError(
                "probe_spec needs the whole model on one process and does not work with FSDP or DeepSpeed: leave it out "
                "and evaluate the checkpoints instead."
            )

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self._every == 0 and state.is_world_process_zero:
            figures = self.measure(model)
            if figures:
                self._log(figures)

    def measure(self, model) -> dict[str, float]:
        """The figures now; the model is left in the mode it was in."""
        training, questions = model.training, self._questions
        prompts = [questions.prompt(row) for row in questions.rows]
        images = [questions.images(row) for row in questions.rows]
        model.eval()
        try:
            answers = self._generate(model, images, prompts, questions.spec.decoding.max_new_tokens)
        finally:
            model.train(training)
        samples = [
            to_sample(row, prompt, answer.to_json())
            for row, prompt, answer in zip(questions.rows, prompts, answers, strict=True)
        ]
        summary = verifier_summary(samples, self._metric, rounds=10) or {}
        figures = {
            "verifier_p_wrong": summary.get("mean_p_unconfident_wrong"),
            "verifier_p_right": summary.get("mean_p_unconfident_right"),
            "verifier_auc": (summary.get("auc") or {}).get("value"),
        }
        return {name: round(value, 4) for name, value in figures.items() if value is not None}
