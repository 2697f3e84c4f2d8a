"""Asking a model whether what a phrase names is in the image: the quality control of positives.

Captions name what is typical and not there; a verifier that learns from them learns to trust just these phrases. Many
models answer "is there a moon?" far better than they caption (POPE against CHAIR), often the very model to be trained.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ...endpoint import ChatRequest, EndpointClient, user_message
from ...errors import UserError
from ..images import open_image
from .lexicon import YES_NO, fix_article, words
from .taggers import Chunk

Asked = Sequence[tuple[Sequence[Any], Chunk]]  # images, phrase
ANSWER_TOKENS = 4
BATCH = 32


class Checker(Protocol):
    name: str  # of the model and the question: the same name gives the same verdicts

    def there(self, asked: Asked) -> list[bool | None]:
        """For each phrase whether it is in its images; None where the answer is neither yes nor no."""


class ModelChecker:
    """A checkpoint on this machine, decoded greedily.

    Raises:
        UserError: no checkpoint there, or a question without `{phrase}`.
    """

    def __init__(self, model_dir: str | Path, question: str, image_root: str | Path | None = None):
        from ...models.load import load_for_inference

        self.question, self.image_root = checked_template(question), image_root
        self.name = f"{Path(model_dir).resolve()} {question}"
        self._model, self._processor, _ = load_for_inference(model_dir)

    def there(self, asked: Asked) -> list[bool | None]:
        from ...decoding import SamplingConfig, generate_plain

        pictures = [[open_image(image, self.image_root) for image in images] for images, _ in asked]
        answers = generate_plain(
            self._model,
            self._processor,
            pictures,
            [question_about(chunk, self.question) for _, chunk in asked],
            SamplingConfig(max_new_tokens=ANSWER_TOKENS),
            batch_size=BATCH,
        )
        return [read_verdict(answer.text) for answer in answers]


class EndpointChecker:
    """A model behind an OpenAI-compatible endpoint; a request that fails is no verdict."""

    def __init__(self, client: EndpointClient, question: str, image_root: str | Path | None = None):
        self.client, self.question, self.image_root = client, checked_template(question), image_root
        self.name = f"{client.model} {question}"

    def there(self, asked: Asked) -> list[bool | None]:
        requests = (
            ChatRequest(
                id=f"{'|'.join(map(str, images))}: {chunk.text}",
                messages=[user_message(question_about(chunk, self.question), images)],
                max_tokens=ANSWER_TOKENS,
                image_root=self.image_root,
            )
            for images, chunk in asked
        )
        replies = self.client.complete(requests)
        return [read_verdict(reply.texts[0]) if reply.texts else None for reply in replies]


def checked_template(question: str) -> str:
    if "{phrase}" not in question:
        raise UserError(f"The check question {question!r} has no {{phrase}} in it.")
    return question


def question_about(chunk: Chunk, template: str) -> str:
    """`the red kettle` -> `Is there a red kettle …?`; plural phrases are asked for as they are, with "Are there"."""
    said = words(chunk.text)[:1]
    phrase = (
        chunk.text[0].lower() + chunk.text[1:] if chunk.text[1:2].islower() or said == ["a"] else chunk.text
    )
    if said and said[0] in ("the", "this", "that", "these", "those"):
        phrase = phrase[len(said[0]) :].lstrip()
        phrase = phrase if chunk.plural else fix_article(f"a {phrase}")
    if chunk.plural and said != ["a"]:
        template = re.sub(r"^Is there\b", "Are there", template)
    return template.replace("{phrase}", phrase)


def read_verdict(answer: str) -> bool | None:
    """The yes or no that an answer begins with."""
    found = YES_NO.match(answer)
    return None if found is None else found.group(1).lower() == "yes"
