"""What the batch decodes on: transformers or vLLM, by the same methods. They are called in the thread of the batch, inside
of `running`; `read` is called in any, one at a time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from ..decoding.answers import Grammar
from ..decoding.cache import prefill
from ..decoding.capabilities import choose_backend, rewindable_attention
from ..decoding.config import SamplingConfig
from ..decoding.engine import Engine, Job, Row
from ..decoding.generate import encode_batch, generate_plain
from ..decoding.vllm_engine import VLLMModel, VLLMPrompt
from ..errors import UserError
from ..models.parts import unwrap


class TransformersRows:
    """Rows of `Engine`.

    Attributes:
        size: answers that are decoded side by side; 1 on a model that cannot rewind its cache.
        longest: most tokens of a prompt and its answer; None: the model's configuration does not say.
    """

    def __init__(self, model, grammar: Grammar, size: int):
        self.model, self.grammar = model, grammar
        self.longest = getattr(unwrap(model).config.get_text_config(), "max_position_embeddings", None)
        with self.running():
            self.clear()
        self.size = size if self.engine.backend.keeps_keys else 1

    @contextmanager
    def running(self) -> Iterator[None]:
        with rewindable_attention(self.model), torch.inference_mode():
            yield

    @property
    def rows(self) -> list[Row]:
        return self.engine.rows

    def read(self, processor, text: str, pictures: list[Image.Image]) -> tuple[dict[str, Any], list[int]]:
        """A prompt for `admit`, and its tokens as the model sees them. Raises UserError: the processor refuses it."""
        inputs = encode_batch(self.model, processor, [text], [pictures])
        return inputs, inputs["input_ids"][0].tolist()

    def admit(self, jobs: Sequence[Job], inputs: dict[str, Any]) -> None:
        """New rows, with the prompt read once."""
        backend = self.engine.backend
        start = prefill(self.model, inputs, own_cache=backend.keeps_keys)
        for number, job in enumerate(jobs):
            if number:  # the image was encoded and the prompt read for the first one
                job.images, start = 0, replace(start, forwarded=[0])
            self.engine.admit([[job]], start)
        if backend.keeps_keys:
            backend.reserve(self.size)

    def step(self) -> list[tuple[Job, UserError]]:
        """A token for every row. Returns the jobs that had to be given up, and why: none."""
        self.engine.step()
        return []

    def remove(self, job: Job) -> None:
        self.engine.remove(job)

    def clear(self) -> None:
        """Begin anew, with an empty cache."""
        self.engine = Engine(choose_backend(self.model), self.grammar)


class VLLMRows:
    """Rows of `VLLMModel`.

    Raises UserError: vLLM makes other tokens of a picture than the processor, or does not answer.
    """

    def __init__(self, model: VLLMModel, processor):
        self.model, self.size, self.longest = model, model.in_flight, model.longest
        self.step, self.remove, self.clear = model.step, model.remove, model.clear
        # the first prompt is compared: better now than when a client asks
        picture = Image.linear_gradient("L").convert("RGB").resize((64, 48))
        generate_plain(model, processor, [picture], ["What?"], SamplingConfig(max_new_tokens=1))

    running = nullcontext

    @property
    def rows(self) -> list[Row]:
        return self.model.rows

    def read(self, processor, text: str, pictures: list[Image.Image]) -> tuple[VLLMPrompt, list[int]]:
        ids = encode_batch(self.model, processor, [text], [pictures])["input_ids"][0].tolist()
        return VLLMPrompt.read(processor, text, pictures, ids if pictures else None), ids

    def admit(self, jobs: Sequence[Job], prompt: VLLMPrompt) -> None:
        for job in jobs:
            self.model.admit(job, prompt)
