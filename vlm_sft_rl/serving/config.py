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
    name: str | None = setting(None, "Name of the model for clients. Default: that of its directory.")
    api_key_env: str | None = setting(
        None, "Environment variable that holds the key that clients must send. Default: no key is needed."
    )
    engine: str = setting(
        "hf",
        "Library that runs the model: hf (transformers) or vllm. Answers are the same where nothing is drawn at random.",
        choices=ENGINES,
    )
    rows: int | None = setting(
        None,
        f"Answers decoded side by side. Default: {ROWS['hf']}; with --engine vllm {ROWS['vllm']}.",
        least=1,
    )
    waiting: int = setting(
        64, "Requests that may wait for their turn. Further ones are refused with status 429.", least=0
    )
    new_tokens: int = setting(1024, "Longest answer that a request may ask for, in tokens.", least=1)
    megabytes: float = setting(20.0, "Largest body of a request, in megabytes.", above=0)
    pixels: int = setting(20_000_000, "Most pixels of all images of a request together.", least=1)
    image_urls: bool = setting(
        False,
        "Fetch images from http(s) addresses that clients name. Leave this off unless you trust the clients: they could "
        "make the server read addresses in its own network.",
    )
    drain: float = setting(
        30.0, "Seconds that answers under way may take to end when the server is stopped.", least=0
    )

    @property
    def side_by_side(self) -> int:
        """The rows, or the engine's default."""
        return self.rows or ROWS[self.engine]
