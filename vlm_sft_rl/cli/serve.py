"""`vlm-sft-rl serve`."""

from pathlib import Path

from ..errors import UserError
from ..settings import configured

SHIPPED = "pocket"


def serve_model(model: str, settings: dict) -> None:
    """Raises UserError: the extra is not installed, no such model, or a setting out of range."""
    from ..serving.config import ServeConfig

    config = configured(ServeConfig, settings, "serve")
    try:
        from ..serving.run import serve
    except ModuleNotFoundError as error:
        raise UserError(
            f"`serve` needs the package {error.name}. Install it with `pip install 'vlm-sft-rl[serve]'`."
        ) from error
    folder = Path(model)
    if model == SHIPPED and not folder.is_dir():
        from ..demos.frame import VERIFIER

        folder = VERIFIER
    serve(folder, config, config.name or (SHIPPED if model == SHIPPED else folder.resolve().name))
