"""What a training run shows: one line for each logging step, in columns, on a terminal and in a log file alike."""

import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

HEADER_EVERY = 30  # lines
WIDTH = 9  # of a column, at the least
COMMON = {"learning_rate": "lr", "skipped_rows": "skipped"}
# of an evaluation, what says nothing of the model
_UNTOLD = ("runtime", "samples_per_second", "steps_per_second", "num_tokens", "entropy", "epoch")


class StepTable(ProgressCallback):
    """Prints what is logged as a table; below it, on a terminal, the progress bar of transformers.

    Everything that is logged, shown or not, stands in `trainer_state.json` and goes where `report_to` says.

    Args:
        columns: metric -> heading, of what the method tells beside loss and learning rate. A metric that ends with `/`
            stands for all that begin with it, under the rest of their names.
    """

    def __init__(self, columns: Mapping[str, str]):
        super().__init__()
        self.columns = {"loss": "loss", **columns, **COMMON}
        self._shown: Sequence[str] = ()
        self._lines = self._first = 0
        self._begun = time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):
        self._first, self._begun = state.global_step, time.monotonic()
        if not args.disable_tqdm and sys.stderr.isatty():
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if not args.disable_tqdm and sys.stderr.isatty():
            super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        if "train_runtime" in logs:
            self._say(_summary(state, logs))
        elif evaluated := {n.removeprefix("eval_"): v for n, v in logs.items() if n.startswith("eval_")}:
            figures = (f"{_words(n)} {_number(v)}" for n, v in evaluated.items() if n not in _UNTOLD)
            self._say(f"step {state.global_step}, evaluation: {', '.join(figures)}")
        elif "loss" in logs:
            self._row(state, logs)

    def _row(self, state, logs: Mapping[str, float]) -> None:
        values = self._values(logs)
        if [*values] != [*self._shown] or self._lines % HEADER_EVERY == 0:
            self._shown, self._lines = [*values], 0
            self._say(self._line("step", {name: name for name in values}, "left"))
        self._lines += 1
        done = state.global_step - self._first
        left = (time.monotonic() - self._begun) / max(done, 1) * (state.max_steps - state.global_step)
        place = f"{state.global_step}/{state.max_steps}"
        cells = {
            heading: f"{value:.2e}" if heading == "lr" else _number(value)
            for heading, value in values.items()
        }
        self._say(self._line(place, cells, str(timedelta(seconds=round(left)))))

    def _values(self, logs: Mapping[str, float]) -> dict[str, float]:
        """What is shown of a record, by heading, in the order of the columns."""
        values = {}
        for metric, heading in self.columns.items():
            names = [name for name in logs if name.startswith(metric)] if metric.endswith("/") else [metric]
            for name in names:
                if name in logs:
                    values[heading or name.removeprefix(metric).replace("_", " ")] = logs[name]
        if not values.get("skipped"):
            values.pop("skipped", None)
        return values

    def _line(self, place: str, cells: Mapping[str, str], left: str) -> str:
        widths = (max(len(heading), WIDTH) for heading in cells)
        middle = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells.values(), widths, strict=True))
        return f"{place:>11}  {middle}  {left:>8}"

    def _say(self, line: str) -> None:
        if self.training_bar is not None:
            self.training_bar.write(line)
        else:
            print(line, flush=True)


class ShortRuns(TrainerCallback):
    """A run of fewer steps than `logging_steps`, of which nothing would be logged, logs about `LINES` times.

    The state is left alone: a checkpoint would hand a changed `logging_steps` on to a longer run.
    """

    LINES = 10

    def on_step_end(self, args, state, control, **kwargs):
        if args.logging_strategy == "steps" and state.max_steps < state.logging_steps:
            every = -(-state.max_steps // self.LINES)
            if state.global_step % every == 0 or state.global_step == state.max_steps:
                control.should_log = True


def show_steps(trainer, columns: Mapping[str, str]) -> None:
    """Let a trainer show its steps as a table; a notebook keeps the one that transformers draws there."""
    trainer.add_callback(ShortRuns())
    shown = {type(callback) for callback in trainer.callback_handler.callbacks}
    for kind in (ProgressCallback, PrinterCallback):
        if kind in shown:
            trainer.remove_callback(kind)
            trainer.add_callback(StepTable(columns))


def _summary(state, logs: Mapping[str, float]) -> str:
    taken = timedelta(seconds=round(logs["train_runtime"]))
    loss = f", mean loss {_number(logs['train_loss'])}" if "train_loss" in logs else ""
    return f"{state.global_step} steps, {taken} of training{loss}"


def _words(name: str) -> str:
    return name.replace("/", " ").replace("_", " ")


def _number(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
