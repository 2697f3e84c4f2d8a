"""The small file beside every checkpoint that says what decoding needs and the weights do not tell."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..data.tags import CONFIDENT, OPEN, UNCONFIDENT
from ..errors import UserError
from ..io import read_json, write_json

FILE_NAME = "vlm_sft_rl.json"
FORMAT = 1


@dataclass(frozen=True)
class Sidecar:
    """What `vlm_sft_rl.json` holds.

    Attributes:
        verification_tokens: the strings of the roles `open`, `confident` and `unconfident`.
        threshold: the default tau on P(`</UN>`) for decoding, 0 < tau < 1.
        decoding: further fields of `RetrospectiveConfig` that suit this checkpoint, chosen on validation data.
        box_convention: how the model writes boxes, or None.
        recipe: the settings the checkpoint was trained with, or None.
    """

    verification_tokens: dict[str, str] = field(
        default_factory=lambda: {"open": OPEN, "confident": CONFIDENT, "unconfident": UNCONFIDENT}
    )
    threshold: float = 0.003
    decoding: dict[str, Any] = field(default_factory=dict)
    box_convention: str | None = None
    recipe: dict[str, Any] | None = None

    def __post_init__(self):
        if not isinstance(self.threshold, int | float) or not 0 < self.threshold < 1:
            raise UserError(f"{FILE_NAME}: `threshold` must lie between 0 and 1, not {self.threshold!r}.")
        tokens = self.verification_tokens
        if not isinstance(tokens, dict) or set(tokens) != {"open", "confident", "unconfident"}:
            raise UserError(
                f"{FILE_NAME}: `verification_tokens` must name `open`, `confident` and `unconfident`, "
                f"not {tokens!r}."
            )


def write_sidecar(directory: str | Path, sidecar: Sidecar) -> Path:
    return write_json(Path(directory) / FILE_NAME, {"format": FORMAT, **asdict(sidecar)})


def read_sidecar(directory: str | Path) -> Sidecar | None:
    """The sidecar of a checkpoint directory, None when it has none."""
    path = Path(directory) / FILE_NAME
    if not path.is_file():
        return None
    value = read_json(path)
    version = value.pop("format", None) if isinstance(value, dict) else type(value).__name__
    if version != FORMAT:
        raise UserError(
            f"{path}: `format` is {version!r}, this version reads {FORMAT}. Update vlm-sft-rl, or delete the file to "
            "use the defaults."
        )
    if unknown := sorted(set(value) - set(Sidecar.__dataclass_fields__)):
        raise UserError(f"{path}: unknown field(s) {', '.join(unknown)}. Remove them.")
    try:
        return Sidecar(**value)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
