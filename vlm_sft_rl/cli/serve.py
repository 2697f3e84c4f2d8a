"""`vlm-sft-rl serve` and `view`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from ..settings import configured
from .common import SHIPPED, model_folder


@contextmanager
def _needed(command: str) -> Iterator[None]:
    """Imports that need the extra. Raises UserError: it is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"`{command}` needs the package {error.name}. Install it with `pip install 'vlm-sft-rl[serve]'`."
        ) from error


def view_runs(folder: Path, host: str, port: int) -> None:
    """Raises UserError: the extra is not installed, or no such folder."""
    with _needed("view"):
        from ..serving.view import view
    view(folder, host, port)


def serve_model(model: str, settings: dict) -> None:
    """Raises UserError: the extra is not installed, no such model, or a setting out of range."""
    from ..serving.config import ServeConfig

    config = configured(ServeConfig, settings, "serve")
    with _needed("serve"):
        from ..serving.run import serve
    folder = model_folder(model)
    serve(folder, config, config.name or (SHIPPED if model == SHIPPED else folder.resolve().name))
