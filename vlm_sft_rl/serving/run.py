"""Loading a model and serving it until the process is told to stop."""

import os
from pathlib import Path

import uvicorn

from ..data.chat import get_tokenizer
from ..data.tags import VERIFICATION_TOKENS
from ..decoding.config import engine_version
from ..errors import UserError
from ..evaluation.decoders import check_model_folder, load_model_and_processor
from ..models.sidecar import read_sidecar
from .app import create_app
from .batch import ContinuousBatch
from .config import ServeConfig

# GiB of pictures that vLLM keeps as its model takes them, for rewinds and for questions about the same picture; its default
# is 4, and a server would grow until it has them
PICTURE_CACHE = 1


def serve(folder: Path, config: ServeConfig, name: str) -> None:
    """Serve a checkpoint; returns when the process was told to stop and the answers under way have ended.

    Raises UserError: no checkpoint, the engine is not installed or cannot run it, or the variable of the key is not set.
    """
    check_model_folder(folder)
    engine_version(config.engine)
    key = None
    if config.api_key_env is not None:
        key = os.environ.get(config.api_key_env, "").strip()
        if not key:
            raise UserError(f"The environment variable {config.api_key_env} is not set. Put the key into it.")
    rows = config.side_by_side
    model, processor = load_model_and_processor(
        folder, engine=config.engine, in_flight=rows, mm_processor_cache_gb=PICTURE_CACHE
    )
    batch = ContinuousBatch(model, processor, rows=rows, waiting=config.waiting)
    app = create_app(batch, folder, default_decoder(folder, processor), config, name=name, key=key)
    options = {"log_level": "warning", "timeout_graceful_shutdown": int(config.drain), "server_header": False}
    server = AnnouncingServer(uvicorn.Config(app, host=config.host, port=config.port, **options))
    server.announce = lambda address: print(
        f"{name} answers at {address}/v1 (its page: {address}/). Stop it with Ctrl-C.", flush=True
    )
    try:
        server.run()
    finally:
        batch.close(config.drain)


class AnnouncingServer(uvicorn.Server):
    """Says where it listens once it does."""

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            host, port = server.sockets[0].getsockname()[:2]
            self.announce(f"http://{host}:{port}")


def default_decoder(folder: Path, processor) -> str:
    """Retrospective resampling where the checkpoint knows the verification tokens and says its threshold, else greedy."""
    vocabulary = get_tokenizer(processor).get_vocab()
    has_tags = all(token in vocabulary for token in VERIFICATION_TOKENS)
    return "retrospective" if has_tags and read_sidecar(folder) is not None else "greedy"
