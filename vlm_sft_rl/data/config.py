"""Data settings of a recipe."""

from dataclasses import dataclass, field

from ..errors import UserError


@dataclass
class VLMDataConfig:
    """Where the rows and their images are, and what to do with bad ones."""

    train_file: str | None = field(
        default=None,
        metadata={"help": "Training rows: JSONL, or a JSON array in LLaVA's, REVERSE's or TRL's format."},
    )
    eval_file: str | None = field(
        default=None, metadata={"help": "Evaluation rows, same formats. None: no evaluation."}
    )
    image_root: str | None = field(
        default=None,
        metadata={"help": "Folder that the rows' image paths start from. None: the folder of `train_file`."},
    )
    subsample: int | None = field(
        default=None,
        metadata={"help": "Train on this many rows, drawn without replacement. None: all."},
    )
    subsample_seed: int = field(default=0, metadata={"help": "Seed of that draw."})
    index_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for the Arrow index of the files. None: beside the source file."},
    )
    on_bad_row: str = field(
        default="error",
        metadata={
            "help": "`error` stops at the first bad row; `skip` leaves it out and records it in `rejects_file`.",
            "choices": ["error", "skip"],
        },
    )
    rejects_file: str | None = field(
        default=None,
        metadata={"help": "Where skipped rows are recorded. None: rejects.jsonl in the output folder."},
    )
    probe_spec: str | None = field(
        default=None,
        metadata={
            "help": "Eval spec whose questions the model answers during training; logged is how well P(</UN>) tells "
            "its own wrong phrases from right ones (`verifier_auc`). Below 0.75 no threshold will help."
        },
    )
    probe_data_dir: str | None = field(default=None, metadata={"help": "Folder the spec's files are in."})
    probe_questions: str | None = field(
        default=None, metadata={"help": "Other questions than the spec's: a validation split."}
    )
    probe_every: int = field(default=100, metadata={"help": "Steps between probes."})
    probe_limit: int = field(default=64, metadata={"help": "Questions per probe."})

    def __post_init__(self):
        if self.on_bad_row not in ("error", "skip"):
            raise UserError(f"`on_bad_row` must be `error` or `skip`, not {self.on_bad_row!r}.")
