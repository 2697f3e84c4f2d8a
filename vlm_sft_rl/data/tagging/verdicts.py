"""Whether what a phrase names is in the image: by ground truth, or by asking a model."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from posixpath import normpath
from typing import Any

from ...errors import FORMAT, RowError, UserError, short
from ...io import read_jsonl, read_text
from ...teacher import ChatRequest, EndpointClient, user_message
from ..conclusions import conclusion
from ..images import open_image
from .phrases import ADJECTIVES, YES_NO, Phrase, all_present, fix_article, words

CHECK_BATCH = 32  # questions to a model at once
CHECK_TOKENS = 4  # of its answers
Grade = Callable[[str, Any], bool]
Claims = Sequence[tuple[Sequence[Any], Phrase]]  # images, and a phrase that is said of them


# --- Ground truth ---


@dataclass(frozen=True)
class Scene:
    """Ground truth of an image: the nouns that are in it, and its theme (background), if it has one."""

    objects: Collection[str]
    theme: str | None = None


def read_objects(path: str | Path) -> dict[str, Scene]:
    """Ground truth by image path.

    Lines are `{"image": path, "objects": [noun or {"noun": noun}], "theme": text?}`, one an image, or region rows with
    `image` and `category`, of which an image may have many.

    Raises UserError: a line without these fields, or an image whose `objects` come twice.
    """
    scenes: dict[str, Scene] = {}
    for number, line in read_jsonl(path):
        where, image = f"{path}:{number}", line.get("image")
        if not isinstance(image, str) or not image:
            message = f"field `image`: expected the path of a picture, found {short(image)}."
            raise RowError(FORMAT, message, where)
        before = scenes.get(normpath(image))
        if line.get("objects") is None and line.get("category"):
            nouns = nouns_of([line["category"]], where) + list(before.objects if before else ())
        else:
            nouns = nouns_of(line.get("objects"), where)
            if before is not None:
                message = f"the image {image!r} was described before. Keep one line for it."
                raise RowError(FORMAT, message, where)
        if not isinstance(theme := line.get("theme"), str | None):
            raise RowError(FORMAT, f"field `theme`: expected text, found {short(theme)}.", where)
        scenes[normpath(image)] = Scene(list(dict.fromkeys(nouns)), theme)
    if not scenes:
        raise UserError(f"{path}: no pictures in it.")
    return scenes


def nouns_of(objects: object, where: str) -> list[str]:
    items = objects if isinstance(objects, list) else [None]
    nouns = [item.get("noun", item.get("category")) if isinstance(item, dict) else item for item in items]
    if not all(isinstance(noun, str) and noun.strip() for noun in nouns):
        message = f'field `objects`: expected a list of nouns or of {{"noun": …}}, found {short(objects)}.'
        raise RowError(FORMAT, message, where)
    return [noun.strip().lower() for noun in nouns]


def read_vocabulary(path: str | Path | None, scenes: Iterable[Scene] = ()) -> list[str]:
    """The nouns that phrases are found by: one a line of the file, or all nouns of the ground truth.

    Raises UserError: there is none.
    """
    if path is None:
        nouns = {noun for scene in scenes for noun in scene.objects}
    else:
        nouns = {line.strip().lower() for line in read_text(path).splitlines() if line.strip()}
    if not nouns:
        raise UserError(
            f"{path or 'the ground truth'}: no nouns. List those that answers may name, one a line."
        )
    return sorted(nouns)


def scene_of(images: list, truth: Mapping[str, Scene], objects: str | Path | None, where: str) -> Scene:
    if len(images) != 1 or not isinstance(images[0], str):
        raise RowError(FORMAT, f"expected the path of one image, found {short(images)}.", where)
    scene = truth.get(normpath(images[0]))
    if scene is None:
        message = f"the image {images[0]!r} is not in {objects}. Write its path there as it is in the row."
        raise RowError(FORMAT, message, where)
    return scene


def object_grader(nouns: Collection[str], adjectives: Collection[str] = ADJECTIVES) -> Grade:
    """A grader for references with `"objects": [noun, ...]`: right means that the noun is among them."""

    def grade(phrase: str, reference: Mapping) -> bool:
        return bool(all_present(phrase, nouns, set(reference["objects"]), adjectives))

    return grade


# --- Asking a model ---


class Checker:
    """Says of phrases whether they are true: the quality control of positives.

    Captions name what is typical and not there; a verifier that learns from them learns to trust just these phrases.
    Many models answer "is there a moon?" far better than they caption (POPE against CHAIR), often the very model to be
    trained.

    Args:
        model: name of the model; with the same question it gives the same verdicts.
        question: what is asked; `{phrase}` is filled in.

    Raises UserError: a question without `{phrase}`.
    """

    def __init__(self, model: str | Path, question: str, image_root: str | Path | None = None):
        if "{phrase}" not in question:
            raise UserError(f"The check question {question!r} has no {{phrase}} in it.")
        self.name, self.question, self.image_root = f"{model} {question}", question, image_root

    def verdicts(self, claims: Claims) -> list[bool | None]:
        """For each phrase whether it is there; None where the answer is neither yes nor no."""
        questions = [question_about(phrase, self.question) for _, phrase in claims]
        answers = self.answers([images for images, _ in claims], questions)
        verdicts = [YES_NO.match(conclusion(answer).text) for answer in answers]
        return [None if verdict is None else verdict.group(1).lower() == "yes" for verdict in verdicts]

    def answers(self, images: Sequence[Sequence[Any]], questions: Sequence[str]) -> list[str]:
        """The model's answers to questions about images; empty where there is none."""
        raise NotImplementedError


class ModelChecker(Checker):
    """A checkpoint on this machine, decoded greedily. Raises UserError: no checkpoint there."""

    def __init__(self, model_dir: str | Path, question: str, image_root: str | Path | None = None):
        from ...models.load import load_for_inference

        super().__init__(Path(model_dir).resolve(), question, image_root)
        self._model, self._processor, _ = load_for_inference(model_dir)

    def answers(self, images: Sequence[Sequence[Any]], questions: Sequence[str]) -> list[str]:
        from ...decoding import SamplingConfig, generate_plain

        pictures = [[open_image(image, self.image_root) for image in row] for row in images]
        config = SamplingConfig(max_new_tokens=CHECK_TOKENS)
        answers = generate_plain(
            self._model, self._processor, pictures, questions, config, batch_size=CHECK_BATCH
        )
        return [answer.text for answer in answers]


class EndpointChecker(Checker):
    """A model behind an OpenAI-compatible endpoint; a request that fails is no verdict."""

    def __init__(self, client: EndpointClient, question: str, image_root: str | Path | None = None):
        super().__init__(client.model, question, image_root)
        self.client = client

    def answers(self, images: Sequence[Sequence[Any]], questions: Sequence[str]) -> list[str]:
        requests = (
            ChatRequest(
                id=f"{'|'.join(map(str, row))}: {question}",
                messages=[user_message(question, row)],
                max_tokens=CHECK_TOKENS,
                image_root=self.image_root,
            )
            for row, question in zip(images, questions, strict=True)
        )
        return [reply.texts[0] if reply.texts else "" for reply in self.client.complete(requests)]


def question_about(phrase: Phrase, template: str) -> str:
    """`the red kettle` -> `Is there a red kettle …?`; plural phrases are asked for as they are, with "Are there"."""
    text = phrase.text
    first = next(iter(words(text)), "")
    if text[1:2].islower() or first == "a":
        text = text[0].lower() + text[1:]
    if first in ("the", "this", "that", "these", "those"):
        text = text[len(first) :].lstrip()
        text = text if phrase.plural else fix_article(f"a {text}")
    if phrase.plural and first != "a":
        template = re.sub(r"^Is there\b", "Are there", template)
    return template.replace("{phrase}", text)
