"""The two questions of the loop, as text and as tokens: describe a region, locate a description."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from transformers.utils import logging

from ..data.chat import ChatRenderer, image_end, tail_ids
from ..errors import UserError
from .boxes import BoxConvention, convention_for, resized_sizes
from .load import check_config
from .sidecar import read_sidecar

logger = logging.get_logger(__name__)

# as LLaVA-1.5's own RefCOCO training rows ask
DESCRIBE = "Please provide a short description for this region: {box}"
LOCATE = "Please provide the bounding box coordinate of the region this sentence describes: {description}"
STAND_IN = "a thing"


def crops_ends(image_processor) -> bool:
    """Does it fit the short side of a picture and cut off what of the long side is left?"""
    # padding comes before the crop in LLaVA's processors, and a `size` of height and width squeezes the picture
    return bool(
        getattr(image_processor, "do_center_crop", False)
        and not getattr(image_processor, "do_pad", False)
        and image_processor.size.get("shortest_edge")
    )


@dataclass(frozen=True)
class Target:
    """A located box as tokens: `prompt` stands behind the image and is given, `answer` is what the model writes."""

    prompt: list[int]
    answer: list[int]


class RegionPrompts:
    """Renders the questions for one processor and one box convention.

    Args:
        describe: the question for a description; `{box}` is the region as the convention writes it.
        locate: the question for a box; `{description}` is what to find.

    Attributes:
        opening: tokens that begin every located box (`<box>(`, `{"bbox_2d": [`): forced when locating, and without
            loss when it is trained, so that only coordinates, close and end of turn are learnt.
    """

    def __init__(self, processor, convention: BoxConvention, describe: str = DESCRIBE, locate: str = LOCATE):
        for name, template, field in (
            ("describe_prompt", describe, "{box}"),
            ("locate_prompt", locate, "{description}"),
        ):
            if field not in template:
                raise UserError(f"{name}: {template!r} must contain {field}.")
        self.processor, self.convention = processor, convention
        self._describe, self._locate = describe, locate
        self._resized: dict[tuple[int, int], tuple[float, float]] = {}
        self.renderer = ChatRenderer(processor)
        plain = tail_ids(processor, self.render(self.locate(STAND_IN)))
        target = self.target(STAND_IN, (0, 0, 50, 50), (100, 100), (100, 100))
        if target.prompt[: len(plain)] != plain:
            raise UserError(
                "The chat template writes another header before an answer than it prompts with, so a located box "
                "cannot be trained as it is asked for."
            )
        self.opening = target.prompt[len(plain) :]
        self.opening_text = processor.tokenizer.decode(self.opening, skip_special_tokens=True)

    def resized(self, picture) -> tuple[float, float] | None:
        """The size at which the vision tower sees a picture, for conventions that count its pixels.

        Warns once when the processor cuts the ends off a picture that is not square: boxes there are of what the tower
        never sees. Checkpoints are published so, hence no refusal.
        """
        if picture.width != picture.height and crops_ends(self.processor.image_processor):
            logger.warning_once(
                f"{type(self.processor.image_processor).__name__} crops pictures to a square around their centre "
                "(`do_center_crop`), and there are pictures that are not square: the model never sees what lies at the "
                "ends of the long side, and boxes there cannot be learnt. Let the processor pad instead: in the "
                '`image_processor` settings of the checkpoint `"image_processor_type": "LlavaImageProcessor", "do_pad": '
                'true, "do_center_crop": false`, and `box_convention: llava-pad`.'
            )
        if not self.convention.needs_resized:
            return None
        if picture.size not in self._resized:
            # a processor with a patch grid goes by the picture's size alone, and data sets have few sizes
            features = self.processor.image_processor(images=[picture], return_tensors="pt")
            self._resized[picture.size] = resized_sizes(features, self.processor)[0]
        return self._resized[picture.size]

    def with_sizes(self, rows: list[dict]) -> list[dict]:
        """Opened rows (`picture`) with `resized`, which some box conventions need."""
        return [row | {"resized": self.resized(row["picture"])} for row in rows]

    def describe_question(self, row: dict) -> str:
        """The question for a description of a row's box."""
        size = (row["width"], row["height"])
        box = self.convention.format(row["box"], size, row.get("resized"))
        return self._describe.replace("{box}", box)

    def describe(self, row: dict) -> str:
        """The same question rendered."""
        return self.render(self.describe_question(row))

    def describe_tail(self, row: dict) -> list[int]:
        """Tokens behind the image that ask for a description of a row's box."""
        return tail_ids(self.processor, self.describe(row))

    def answer_ids(self, text: str, row: dict) -> list[int]:
        """The tokens of a description as the model would write it, end of turn included."""
        return self._learnt(self.describe_question(row), text)[1]

    def locate(self, description: str) -> str:
        return self._locate.replace("{description}", description)

    def locate_tail(self, description: str) -> list[int]:
        """Tokens behind the image that ask where `description` is, the forced opening included."""
        return tail_ids(self.processor, self.render(self.locate(description))) + self.opening

    def target(self, description: str, box, size, resized=None) -> Target:
        """A located box for training: the tokens that are given and the tokens that are learnt."""
        answer = self.convention.format(box, size, resized)
        opening = self.convention.opening
        forced = len(opening) if opening and answer.startswith(opening) else 0
        return Target(*self._learnt(self.locate(description), answer, forced))

    def _learnt(self, question: str, answer: str, forced: int = 0) -> tuple[list[int], list[int]]:
        """Tokens behind the image up to the answer's first `forced` characters, and the answer's others."""
        # weight 0: a model's own answer may be empty; what of it is learnt is decided here
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer, "weight": 0},
        ]
        rendered = self.renderer.render({"id": "region", "images": ["-"], "messages": messages})
        span = rendered.answers[0]
        # without an opening the template's blank before the answer is learnt too
        first = rendered.text.index(answer, span.start) + forced if forced else span.start
        encoded = self.processor.tokenizer(
            rendered.text[: span.end],
            add_special_tokens=not self.renderer.has_bos,
            return_offsets_mapping=True,
        )
        ids, ends = list(encoded["input_ids"]), [end for _, end in encoded["offset_mapping"]]
        while ends and ends[-1] == 0:  # a token that the tokenizer added behind the text
            ids.pop(), ends.pop()
        cut = bisect_right(ends, first)
        return ids[image_end(self.processor, ids) : cut], ids[cut:]

    def located_text(self, ids: list[int]) -> str:
        """A locator's answer with the opening that was forced."""
        return self.opening_text + self.processor.tokenizer.decode(ids, skip_special_tokens=True)

    def located(self, ids: list[int], row: dict) -> tuple[float, float, float, float] | None:
        """The box of a locator's answer, None when there is none; the first counts when there are several."""
        boxes = self.convention.parse(
            self.located_text(ids), (row["width"], row["height"]), row.get("resized")
        )
        return boxes[0] if boxes else None

    def finds_box(self, text: str) -> bool:
        """Does this convention read a box from a description?"""
        return bool(self.convention.parse(text, (1000, 1000), (1000, 1000)))

    def render(self, question: str) -> str:
        """A question about one image through the chat template, the assistant's header included."""
        return self.renderer.prompt(question, images=1)


def region_views(model: str | Path, processor, row: dict) -> Iterator[tuple[str, dict, int]]:
    """The two questions of the loop about an opened region row: name, conversation, and how many characters of its answer
    are given and not learnt. A description is learnt by reward, so its conversation has no answer."""
    sidecar = read_sidecar(model)
    config = SimpleNamespace(model_type=(check_config(model) or {}).get("model_type"))
    convention = convention_for(config, sidecar and sidecar.box_convention)
    prompts = RegionPrompts(processor, convention)
    (row,) = prompts.with_sizes([row])
    text = (row.get("expressions") or [STAND_IN])[0]
    box = convention.format(row["box"], (row["width"], row["height"]), row["resized"])
    described = [{"role": "user", "content": prompts.describe_question(row)}]
    located = [{"role": "user", "content": prompts.locate(text)}, {"role": "assistant", "content": box}]
    opening = convention.opening or ""
    prefix = len(opening) if box.startswith(opening) else 0
    for name, messages, characters in (("describe", described, 0), ("locate", located, prefix)):
        conversation = {"id": row["id"], "images": [row["picture"]], "messages": messages}
        yield f"region {row['id']}, {name}", conversation, characters
