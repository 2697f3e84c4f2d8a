"""What becomes of skipped rows while a trainer runs: one file, one figure in the log, one sentence at the end."""

import logging
from collections.abc import Callable

from accelerate import PartialState
from transformers import TrainerCallback

from ..data.rejects import Rejects

logger = logging.getLogger(__name__)


class SkippedRows(TrainerCallback):
    """Begins the file of skipped rows anew with a new run, logs `skipped_rows` (of all processes and epochs, each row
    once), and says the total at the end.

    Args:
        rejects: the collator's.
        record: takes the figures; they join the current step's log record.
    """

    def __init__(self, rejects: Rejects, record: Callable[[dict[str, float]], None]):
        self._rejects, self._record = rejects, record

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            if state.is_world_process_zero:
                self._rejects.clear()
            PartialState().wait_for_everyone()  # nobody adds before it is cleared
            self._rejects.counts()  # and everybody knows that it is

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_log and state.is_world_process_zero:
            self._record({"skipped_rows": self._rejects.counts().total()})

    def on_train_end(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()
        if state.is_world_process_zero and (summary := self._rejects.summary()):
            logger.warning("%s.", summary)
