"""The collator that packs: the rows of a batch as one sequence, rows about one image over one image prefix."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data.chat import image_end
from ..data.collators import Prepared, VisionCollator
from ..data.images import image_key
from ..data.marks import NO_DOUBT, Example
from ..errors import UserError
from .layout import Row, lay_out, shared_length

PACKINGS = ("rows", "image")


class PackedCollator(VisionCollator):
    """A `VisionCollator` whose batch is one sequence without padding, (1, length), and a table of its segments.

    Args:
        packing: "rows" lays the rows end to end. "image" also lets rows about the same images, with the same words up
            to the last of them, share everything up to their first differing token: the images are encoded once and
            their tokens pass the language model once.
        processor, kwargs: as for `VisionCollator`. `pad_to_multiple_of` pads the end of the sequence.

    Calling it returns, for any number of rows, `input_ids`, `attention_mask`, `labels`, `loss_weights`, … (1, length),
    `segments` (see `layout`), and the images' tensors as the processor returns them. The model must have been made to
    understand `segments` (`attention.enable_packing`).

    Rows may come singly or as packs, `{"rows": [row, …]}` (see `plan.PackedDataset`).
    """

    def __init__(self, processor, *args, packing: str = "rows", **kwargs):
        if packing not in PACKINGS:
            raise UserError(f"packing must be one of {', '.join(PACKINGS)}, not {packing!r}.")
        if packing == "image" and not isinstance(getattr(processor, "image_token", None), str):
            raise UserError(
                f"{type(processor).__name__} names no image token, so rows about one image cannot share it. Set "
                "`vision_packing: rows`."
            )
        # before the base class tries its first batch
        self.packing = packing
        self._opened: dict[Any, Any] = {}
        super().__init__(processor, *args, **kwargs)

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        self._opened = {}
        try:
            return super().__call__([row for item in rows for row in item.get("rows", [item])])
        finally:
            self._opened = {}

    def open(self, item: Any):
        """Open each image of a batch once: the same image is then the same object."""
        if self.packing != "image":
            return super().open(item)
        key = image_key(item)
        if key not in self._opened:
            self._opened[key] = super().open(item)
        return self._opened[key]

    def text_kwargs(self) -> dict[str, Any]:
        return super().text_kwargs() | {"pad_to_multiple_of": None}

    def process(self, prepared: list[Prepared]) -> tuple["Features", list[Example]]:
        groups = self._group(prepared)
        leaders = [group[0] for group in groups]
        first = [prepared[i] for i in leaders]
        features, replacements = self.call_processor(first)
        examples = dict(zip(leaders, self.make_examples(features, first, replacements), strict=True))
        aligned = dict(zip(leaders, take_aligned(features, self.processor), strict=True))
        for (leader, *others), written in zip(groups, replacements, strict=True):
            if not others:
                continue
            rows, pictures = [prepared[i] for i in (leader, *others)], [r["replacement"] for r in written]
            examples |= zip(others, self._follow(rows, pictures, examples[leader].input_ids), strict=True)
            for i in others:
                aligned[i] = self._extend(aligned[leader], examples[leader], examples[i])
        return Features(groups, aligned, features), [examples[i] for i in range(len(prepared))]

    def _follow(self, rows: list[Prepared], pictures: list[str], first: list[int]) -> list[Example]:
        """The rows but the first, whose images the processor has already seen in the first and written as `pictures`.

        Args:
            first: the tokens of the first row, as a proof.
        """
        texts, replacements = self.processor.get_text_with_replacements(
            [row.rendered.text for row in rows], images_replacements=pictures * len(rows)
        )
        features = self.processor.tokenizer(texts, **self.text_kwargs())
        examples = self.make_examples(features, rows, replacements)
        if examples[0].input_ids != first:
            # this processor does more to a text than its tokenizer; it has to see the images again
            features, replacements = self.call_processor(rows)
            examples = self.make_examples(features, rows, replacements)
        return examples[1:]

    def _group(self, prepared: list[Prepared]) -> list[list[int]]:
        """Numbers of the rows, those that can share their images together, in the order of their first rows."""
        groups: dict[Any, list[int]] = {}
        for number, row in enumerate(prepared):
            groups.setdefault(self._head(row) or number, []).append(number)
        return list(groups.values())

    def _head(self, row: Prepared) -> tuple | None:
        """The images and the words up to the last of them, where no answer comes before that and some words after."""
        if self.packing != "image" or not row.images:
            return None
        text = row.rendered.text
        end = image_end(self.processor, text)
        answer = row.rendered.answers[0].start if row.rendered.answers else len(text)
        if not text[end:answer].strip():
            return None
        return (*map(id, row.images), text[:end])

    def _extend(self, aligned: dict[str, list[int]], first: Example, other: Example) -> dict[str, list[int]]:
        """Values that go with the tokens of a row, from those of another row about the same images."""
        images = set(self.processor.image_token_ids)
        extended = {}
        for name, values in aligned.items():
            by_id = {i: v for i, v in zip(first.input_ids, values, strict=True) if i in images or v}
            extended[name] = [by_id.get(i, 0) for i in other.input_ids]
        return extended

    def tensors(self, features: "Features", examples: list[Example]) -> dict[str, torch.Tensor]:
        aligned = features.aligned
        if any(example.doubts for example in examples):
            for i, example in enumerate(examples):
                values = dict(example.doubts)
                aligned[i]["doubts"] = [values.get(at, NO_DOUBT) for at in range(len(example.input_ids))]
        groups = [[Row(examples[i], aligned[i]) for i in group] for group in features.groups]
        images = set(getattr(self.processor, "image_token_ids", ()))
        for group in groups:
            shared = shared_length(group)
            if len(group) > 1 and any(i in images for row in group for i in row.example.input_ids[shared:]):
                raise UserError(
                    "Rows about one image differ in their tokens before its end, so they cannot share it: this tokenizer or "
                    "template mixes the image with the words around it. Set `vision_packing: rows`."
                )
        tokenizer = self.processor.tokenizer
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        packed = lay_out(groups, pad, self.pad_to_multiple_of)
        return {**dict(features.images.convert_to_tensors("pt")), **packed}


@dataclass(frozen=True)
class Features:
    """What the processor returned.

    Attributes:
        groups: numbers of the rows that share their images.
        aligned: for each row the values, by name, that go with its tokens, besides ids and mask.
        images: the tensors of the images, once for each group, in the order of the groups.
    """

    groups: list[list[int]]
    aligned: dict[int, dict[str, list[int]]]
    images: Any


def take_aligned(features: Any, processor) -> list[dict[str, list[int]]]:
    """Take everything that goes with the tokens out of `features`, and leave what belongs to the images.

    Raises UserError: a value with one more dimension than the tokens, for which a pack has no place.
    """
    real = [np.asarray(mask, dtype=bool) for mask in features["attention_mask"]]
    aligned: list[dict[str, list[int]]] = [{} for _ in real]
    for name in list(features):
        rows = features[name]
        shape = np.shape(rows[0])
        if len(rows) != len(real) or shape[:1] != real[0].shape:
            continue
        if len(shape) > 1:
            raise UserError(
                f"{type(processor).__name__} returns `{name}`, several values for each token, which a packed sequence "
                "cannot hold. Set `vision_packing: none`."
            )
        # some processors make labels of their own
        if name not in ("input_ids", "attention_mask", "labels"):
            for row, values, mask in zip(aligned, rows, real, strict=True):
                row[name] = np.asarray(values)[mask].tolist()
        del features[name]
    return aligned
