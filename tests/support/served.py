"""A server in this process, which real clients reach, and what they send it."""

import base64
import io
import random
import socket
import threading
import time

from vlm_sft_rl.demos.frame import VERIFIER
from vlm_sft_rl.pocket.render import render
from vlm_sft_rl.pocket.world import draw_scene


def scenes(count: int, seed: int = 5) -> list:
    rng = random.Random(seed)
    return [render(draw_scene(rng, 0.5), number) for number in range(count)]


def data_url(image, form: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return f"data:image/{form.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


def asked(*images, text: str = "Describe the image.") -> list[dict]:
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


class Served:
    """A running server: its address, its batch, and how it is stopped."""

    def __init__(self, model, processor, **options):
        import uvicorn

        from vlm_sft_rl.serving.app import create_app
        from vlm_sft_rl.serving.batch import ContinuousBatch
        from vlm_sft_rl.serving.config import ServeConfig

        key = options.pop("key", None)
        self.config = ServeConfig(**options)
        self.batch = ContinuousBatch(
            model, processor, rows=self.config.side_by_side, waiting=self.config.waiting
        )
        app = create_app(self.batch, VERIFIER, "retrospective", self.config, name="pocket", key=key)
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, args=([listener],), daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def client(self, key: str = "none", **options):
        import openai

        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0, **options)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert self.batch.close(30)
