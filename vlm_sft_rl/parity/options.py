"""The settings of a certificate."""

from dataclasses import dataclass
from pathlib import Path

from ..settings import Checked, setting


@dataclass(frozen=True)
class CertifyOptions(Checked):
    """What `certify` takes beside model and rows."""

    method = "certify"
    image_root: Path | None = setting(
        None, "Folder that the rows' image paths start from; default: the file's."
    )
    limit: int = setting(
        16, "Certify the first so many rows. They also go through the model in one batch.", least=1
    )
    dtype: str = setting(
        "auto",
        "Of the weights. `auto`: bfloat16 on a GPU, float32 on a CPU. float32 shows faults that rounding hides.",
        choices=["auto", "float32", "bfloat16", "float16"],
    )
    device: str | None = setting(None, "For example cpu, cuda:1; default: the first GPU, or the CPU.")
    attn_implementation: str | None = setting(None, "For example sdpa, eager; default: transformers' choice.")
