"""The small file beside every checkpoint that says what decoding needs and the weights do not tell."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..data.model_files import read_settings
from ..data.tags import CONFIDENT, OPEN, UNCONFIDENT
from ..errors import UserError
from ..io import write_json
from ..settings import Checked, configured, setting

FILE_NAME = "vlm_sft_rl.json"
FORMAT = 1
TOKENS = {"open": OPEN, "confident": CONFIDENT, "unconfident": UNCONFIDENT}


@dataclass(frozen=True)
class Sidecar(Checked):
    """What `vlm_sft_rl.json` holds."""

    verification_tokens: dict[str, str] = setting(
        TOKENS, "The strings of the roles `open`, `confident` and `unconfident`."
    )
    threshold: float = setting(0.003, "The default tau on P(`</UN>`) for decoding.", above=0, below=1)
    decoding: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Further fields of `RetrospectiveConfig` that suit this checkpoint, chosen on validation data."
        },
    )
    box_convention: str | None = setting(None, "How the model writes boxes.")
    recipe: dict[str, Any] | None = setting(None, "The settings the checkpoint was trained with.")

    def __post_init__(self):
        super().__post_init__()
        self.require(self.verification_tokens == TOKENS, "verification_tokens", str(TOKENS))


def write_sidecar(directory: str | Path, sidecar: Sidecar) -> Path:
    return write_json(Path(directory) / FILE_NAME, {"format": FORMAT, **asdict(sidecar)})


def read_sidecar(directory: str | Path) -> Sidecar | None:
    """The sidecar of a checkpoint directory, None when it has none."""
    path = Path(directory) / FILE_NAME
    if not path.is_file():
        return None
    value = read_settings(path)
    version = value.pop("format", None)
    if type(version) is not int or version != FORMAT:
        raise UserError(
            f"{path}: `format` is {version!r}, this version reads {FORMAT}. Update vlm-sft-rl, or delete the file to "
            "use the defaults."
        )
    try:
        return configured(Sidecar, value, FILE_NAME)
    except UserError as error:
        raise UserError(f"{path}: {error} Correct it, or delete the file to use the defaults.") from error
