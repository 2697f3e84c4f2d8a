"""The small file beside every checkpoint that says what decoding needs and the weights do not tell."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..data.model_files import HUB_NAME, read_settings
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
    base: str | None = setting(None, "The Hub's name of the model that it was made of.")
    recipe: dict[str, Any] | None = setting(None, "The settings the checkpoint was trained with.")

    def __post_init__(self):
        super().__post_init__()
        self.require(self.verification_tokens == TOKENS, "verification_tokens", str(TOKENS))
        self.require(
            self.base is None or HUB_NAME.fullmatch(self.base), "base", "a name of the Hub (OWNER/NAME)"
        )


def with_base(sidecar: Sidecar, source: str | Path) -> Sidecar:
    """The sidecar of what is made of `source`: it keeps the Hub's name that `source` is or was made of."""
    if sidecar.base is not None or Path(source).exists() or not HUB_NAME.fullmatch(str(source)):
        return sidecar
    return replace(sidecar, base=str(source))


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
