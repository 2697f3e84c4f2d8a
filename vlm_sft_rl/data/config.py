"""Data settings of a recipe."""

from dataclasses import dataclass

from ..errors import UserError
from ..settings import setting


@dataclass
class VLMDataConfig:
    """Where the rows and their images are, and what to do with bad ones."""

    train_file: str | None = setting(
        None, "Training rows: JSONL, or a JSON array in LLaVA's, REVERSE's or TRL's format."
    )
    dataset_name: str | None = setting(
        None,
        "In place of `train_file`: a data set that `datasets` opens, by its name on the Hub or as a folder. Its rows are "
        "checked as those of a file.",
    )
    dataset_config: str | None = setting(None, "Which of its configurations.")
    dataset_split: str = setting("train", "Which of its splits, or a part of one: train[:1000].")
    streaming: bool = setting(
        False,
        "Read it while training, without a copy on the disk: needs `max_steps`; rows are shuffled among 1000 and checked "
        "when their turn comes.",
    )
    eval_file: str | None = setting(None, "Evaluation rows, same formats. None: no evaluation.")
    image_root: str | None = setting(
        None,
        "Folder that the rows' image paths start from. None: the folder of `train_file`, the folder `dataset_name`, or the "
        "current one.",
    )
    subsample: int | None = setting(None, "Train on this many rows, drawn without replacement. None: all.")
    subsample_seed: int = setting(0, "Seed of that draw.")
    index_dir: str | None = setting(
        None, "Folder for the Arrow index of the files. None: beside the source file."
    )
    on_bad_row: str = setting(
        "error",
        "`error` stops at the first bad row; `skip` leaves it out and records it in `rejects_file`.",
        choices=["error", "skip"],
    )
    rejects_file: str | None = setting(
        None, "Where skipped rows are recorded. None: rejects.jsonl in the output folder."
    )
    probe_spec: str | None = setting(
        None,
        "Eval spec whose questions the model answers during training; logged is how well P(</UN>) tells "
        "its own wrong phrases from right ones (`verifier_auc`). Below 0.75 no threshold will help.",
    )
    probe_data_dir: str | None = setting(None, "Folder the spec's files are in.")
    probe_questions: str | None = setting(None, "Other questions than the spec's: a validation split.")
    probe_every: int = setting(100, "Steps between probes.")
    probe_limit: int = setting(64, "Questions per probe.")
    probe_fall: float | None = setting(
        None,
        "Keep the answers from before the first step, read P(</UN>) at their phrases again in every probe "
        "(`verifier_auc_at_start`), and warn at the end where that area has fallen by more than this. None: not measured.",
    )

    def __post_init__(self):
        if self.on_bad_row not in ("error", "skip"):
            raise UserError(f"`on_bad_row` must be `error` or `skip`, not {self.on_bad_row!r}.")
