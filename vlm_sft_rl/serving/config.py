"""How a model is served. No torch."""

from dataclasses import dataclass
from typing import ClassVar

from ..decoding.config import ENGINES
from ..settings import Checked, setting

# answers side by side, where that is not said
ROWS = ENGINES | {"hf": 32}


@dataclass(frozen=True)
class ServeConfig(Checked):
    """Options of `vlm-sft-rl serve`."""

    method: ClassVar[str] = "serve"

    host: str = setting("127.0.0.1", "Address to listen on; 0.0.0.0 is every network of this machine.")
    port: int = setting(8000, "Port to listen on; 0 takes a free one.", least=0, most=65535)
    name: str | None = setting(None, "What clients call the model. Default: the name of its folder.")
    api_key_env: str | None = setting(
        None, "Environment variable with the key that clients must send. Default: no key is asked for."
    )
    engine: str = setting(
        "hf",
        "What computes: `hf` (transformers) or `vllm`. Where nothing is drawn at random the answers are the same.",
        choices=ENGINES,
    )
    rows: int | None = setting(
        None,
        f"Answers that are decoded side by side; {ROWS['hf']}, with --engine vllm {ROWS['vllm']}.",
        least=1,
    )
    waiting: int = setting(
        64, "Requests that may wait for their turn; further ones are told to come back (429).", least=0
    )
    new_tokens: int = setting(1024, "Longest answer in tokens that a request may ask for.", least=1)
    megabytes: float = setting(20.0, "Largest body of a request.", above=0)
    pixels: int = setting(20_000_000, "Most pixels of a request's pictures together.", least=1)
    image_urls: bool = setting(
        False,
        "Fetch pictures from http(s) addresses that clients name. The server then reaches what it can reach on its own "
        "network: leave it off where clients are not trusted.",
    )
    drain: float = setting(
        30.0, "Seconds that answers under way have to end when the server is stopped.", least=0
    )

    @property
    def side_by_side(self) -> int:
        """The rows, or the engine's default."""
        return self.rows or ROWS[self.engine]
