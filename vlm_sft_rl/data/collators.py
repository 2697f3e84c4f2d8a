"""The collators: rows -> processor tensors, labels and loss weights; nothing is cut or dropped in silence."""

import logging
import random
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from ..errors import MIXED, NO_SUPERVISION, PROCESSOR, TAGS, TEMPLATE, TOO_LONG, RowError, UserError
from .chat import ChatRenderer, MessageRange, Rendered
from .images import boxed_size, open_image, random_crop
from .marks import IGNORE, NO_DOUBT, Example, Mark, Turn, add_hints, phrase_mark, verification_ids
from .rejects import Rejects, identity
from .rows import IMAGE_PAIR, PAIR_KINDS, preference_row, region_row, sft_row, sides
from .tags import TagError

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Prepared:
    """A row whose text is rendered and whose images are open. One text branch over its images."""

    row: dict
    rendered: Rendered
    images: list


class VisionCollator:
    """Collates rows for any Hugging Face vision-language processor.

    Args:
        processor: the model's processor, with a fast tokenizer and a chat template.
        image_root: folder that image paths are relative to and may not leave.
        marks: functions `Example -> Example` applied in order (see `marks`).
        max_length: limit in tokens, images included. A longer row is a bad row; nothing is ever truncated.
        rejects_path: a bad row is left out, counted and written there: JSONL of `{"id", "source", "kind", "reason"}`, one
            line a row whatever number of workers, processes and epochs met it (see `rejects.Rejects`). None: it is an
            error.
        hint_probability: see `marks.add_hints`; 0.2 in REVERSE.
        seed: of the hints.
        padding_side: "right" for training; None takes the tokenizer's.
        pad_to_multiple_of: pad the token length up to a multiple.
        always_image: give a batch without images one more row, with a small picture and no loss. On several processes
            a batch that leaves the vision tower out would wait for ever for the others, which use it.

    Calling it returns the processor's tensors for the batch plus `labels` (batch, length), int64, -100 where
    there is no loss, and `loss_weights` (batch, length), float32, 0 where there is no loss; where any row has such
    places `doubts` (batch, length), -1 elsewhere, see `Example`. When every row
    of a batch is skipped, one stand-in without loss is returned (text only, where the processor takes that),
    because a dataloader must return something.

    A subclass may change how a row is laid out (`arrange`), opened (`open`), encoded (`process`) and padded (`tensors`).

    Attributes:
        rejects: the file of skipped rows, shared with all processes; None where a bad row is an error.

    Raises UserError: bad arguments. RowError: a bad row, without `rejects_path`.
    """

    def __init__(
        self,
        processor,
        image_root: str | Path | None = None,
        marks: Sequence[Mark] = (),
        max_length: int | None = None,
        rejects_path: str | Path | None = None,
        hint_probability: float = 0.0,
        seed: int = 0,
        padding_side: str | None = "right",
        pad_to_multiple_of: int | None = None,
        always_image: bool = False,
    ):
        if not 0 <= hint_probability <= 1:
            raise UserError(f"hint_probability must be between 0 and 1, not {hint_probability!r}.")
        if not getattr(getattr(processor, "tokenizer", None), "is_fast", False):
            raise UserError(
                "VisionCollator needs a processor with a fast tokenizer (it uses character offsets)."
            )
        self.processor, self.image_root = processor, image_root
        self.marks, self.max_length = tuple(marks), max_length
        self.hint_probability, self.seed = hint_probability, seed
        self.padding_side, self.pad_to_multiple_of = padding_side, pad_to_multiple_of
        self.renderer = ChatRenderer(processor)
        self.rejects = None if rejects_path is None else Rejects(rejects_path)
        self.always_image = False
        if always_image and (reason := self.trial(0, 1)) is not None:
            logger.warning("this processor takes no rows without images beside rows with them (%s)", reason)
        self.always_image = always_image and reason is None

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        prepared = [p for row in rows if (p := self._guard(self.prepare, row)) is not None]
        features, examples = self._encode_fitting(prepared)
        if not examples:
            logger.warning("every row of a batch was skipped; the reasons are in %s", self.rejects.path)
            images = 0 if not self.always_image and self.trial(0) is None else 1
            features, examples = self.process([self.prepare(stand_in(images))])
        return self.tensors(features, examples)

    @property
    def rejected(self) -> Counter:
        """Skipped rows by kind, those of other processes included."""
        return self.rejects.counts() if self.rejects else Counter()

    def trial(self, *images: int) -> str | None:
        """Why the processor refuses a batch of rows with so many images each; None when it takes it."""
        try:
            self.process([self.prepare(stand_in(count)) for count in images])
        except RowError as error:
            return error.reason
        return None

    def encode(self, row: dict) -> Example:
        """One row alone, without padding: what `__call__` would train on. Raises RowError for a bad row."""
        return self._encode([self.prepare(row)])[1][0]

    def prepare(self, raw: dict) -> Prepared:
        """Normalise a row, add its hints, render its text and open its images. Raises RowError."""
        row = self.read(raw)
        try:
            return Prepared(row, self.renderer.render(row), [self.open(item) for item in row["images"]])
        except RowError as error:
            raise error.at(identity(row)) from error

    def read(self, raw: dict) -> dict:
        """The row as it is rendered: normalised, arranged, with its hints. Raises RowError."""
        row = self.arrange(sft_row(raw, identity(raw)))
        return add_hints(row, self.hint_probability, self.seed)

    def arrange(self, row: dict) -> dict:
        """For subclasses: the conversation to train on, from a normalised row."""
        return row

    def open(self, item: Any) -> Image.Image:
        return open_image(item, self.image_root)

    def process(self, prepared: list[Prepared]) -> tuple[Any, list[Example]]:
        """The processor's features of a batch, and its rows as tokens without padding, before marks and checks."""
        features, replacements = self.call_processor(prepared)
        return features, self.make_examples(features, prepared, replacements)

    def tensors(self, features: Any, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """The batch: padded labels and weights beside the processor's tensors."""
        width = len(features["input_ids"][0])
        # through numpy: a tensor from a list takes ten times as long
        labels = np.full((len(examples), width), IGNORE, dtype=np.int64)
        weights = np.zeros((len(examples), width), dtype=np.float32)
        for i, example in enumerate(examples):
            start, end = _real_tokens(features["attention_mask"][i])
            labels[i, start:end] = example.labels
            weights[i, start:end] = example.weights
        for key, value in features.items():
            if isinstance(value, list) and isinstance(value[0], list) and isinstance(value[0][0], int):
                features[key] = np.array(value, dtype=np.int64)
        batch = dict(features.convert_to_tensors("pt"))
        if any(example.doubts for example in examples):
            doubts = np.full((len(examples), width), NO_DOUBT, dtype=np.float32)
            for i, example in enumerate(examples):
                start, _ = _real_tokens(features["attention_mask"][i])
                for place, value in example.doubts:
                    doubts[i, start + place] = value
            batch["doubts"] = torch.from_numpy(doubts)
        return {**batch, "labels": torch.from_numpy(labels), "loss_weights": torch.from_numpy(weights)}

    def _encode(self, prepared: list[Prepared]) -> tuple[Any, list[Example]]:
        """`process`, with a picture where there must be one, then the marks and the checks that need tokens."""
        blind = self.always_image and not any(p.images for p in prepared)
        features, examples = self.process([*prepared, *([self.prepare(stand_in(1))] if blind else [])])
        marked = [self._mark(example, p.row) for example, p in zip(examples, prepared, strict=False)]
        return features, [*marked, *examples[len(prepared) :]]

    def _encode_fitting(self, prepared: list[Prepared]) -> tuple[Any, list[Example]]:
        """Encode one batch, without the rows that cannot be in it where those are to be skipped."""
        try:
            return self._encode(prepared) if prepared else (None, [])
        except RowError:
            # find the culprits one by one, then what goes together
            alone = [p for p in prepared if self._guard(lambda p: self._encode([p]), p) is not None]
        fitting: list[Prepared] = []
        if len(alone) == len(prepared):
            for p in alone:
                if self._guard(lambda p: self._encode_beside(fitting, p), p) is not None:
                    fitting.append(p)
        return self._encode_fitting(fitting or alone)

    def _encode_beside(self, others: list[Prepared], prepared: Prepared) -> tuple[Any, list[Example]]:
        try:
            return self._encode([*others, prepared])
        except RowError as error:
            raise RowError(
                MIXED,
                f"the processor takes it alone but not beside {identity(others[0].row)} ({error.reason}) Set "
                "`per_device_train_batch_size: 1`, or train rows with and without images in runs of their own.",
                identity(prepared.row),
            ) from error

    def call_processor(self, prepared: list[Prepared]) -> tuple[Any, list[list[dict]]]:
        """What the processor returns, and for each row what it wrote in the place of each image."""
        images = [p.images for p in prepared]
        try:
            features = self.processor(
                text=[p.rendered.text for p in prepared],
                images=images if any(images) else None,
                return_text_replacement_offsets=True,
                **self.text_kwargs(),
            )
        except Exception as error:  # each processor refuses in its own way
            names = ", ".join(identity(p.row) for p in prepared[:3]) + (" …" if len(prepared) > 3 else "")
            raise RowError(
                PROCESSOR, f"{type(self.processor).__name__} refuses it ({error}).", names
            ) from error
        if len(features.get("aspect_ratio_ids", ())) not in (0, len(features.get("pixel_values", ()))):
            # Llama-3.2-Vision's leaves rows without a picture out of some tensors, and the model fails on their shapes
            raise RowError(
                PROCESSOR,
                f"{type(self.processor).__name__} makes tensors of different numbers of rows when some have no image.",
                ", ".join(identity(p.row) for p in prepared if not p.images),
            )
        return features, features.pop("text_replacement_offsets", None) or [[]] * len(prepared)

    def text_kwargs(self) -> dict[str, Any]:
        kwargs: dict[str, Any] = {"padding": True, "truncation": False, "return_offsets_mapping": True}
        if self.renderer.has_bos:
            kwargs["add_special_tokens"] = False
        if self.padding_side:
            kwargs["padding_side"] = self.padding_side
        if self.pad_to_multiple_of:
            kwargs["pad_to_multiple_of"] = self.pad_to_multiple_of
        return kwargs

    def make_examples(self, features: Any, prepared: list[Prepared], replacements: list) -> list[Example]:
        """The rows without padding; takes `offset_mapping` out of the features."""
        offsets = features.pop("offset_mapping")
        examples = []
        for i, p in enumerate(prepared):
            start, end = _real_tokens(features["attention_mask"][i])
            ids, spans = _plain(features["input_ids"][i])[start:end], _plain(offsets[i])[start:end]
            try:
                examples.append(_example(p.rendered, ids, spans, replacements[i]))
            except RowError as error:
                raise error.at(identity(p.row)) from error
        return examples

    def _mark(self, example: Example, row: dict) -> Example:
        where = identity(row)
        check_length(len(example.input_ids), self.max_length, where)
        try:
            for mark in self.marks:
                example = mark(example)
        except (RowError, TagError) as error:
            kind, reason = getattr(error, "kind", TAGS), getattr(error, "reason", str(error))
            raise RowError(kind, reason, where) from error
        if all(label == IGNORE for label in example.labels):
            raise RowError(
                NO_SUPERVISION,
                "no token has loss: the answer is empty, has weight 0, or is masked out (a message with "
                '`"supervise": "verdicts"` needs the verification mark and a tag). Drop or correct the row.',
                where,
            )
        return example

    def _guard(self, step: Callable[[Any], T], item: Any) -> T | None:
        """Run `step(item)`; where bad rows are skipped, a RowError becomes a recorded reject and None."""
        try:
            return step(item)
        except RowError as error:
            if self.rejects is None:
                raise
            row = item.row if isinstance(item, Prepared) else item
            error = error.at(identity(row))
            if self.rejects.add(row, error) == 1:
                logger.warning("skipping bad rows, see %s; the first: %s", self.rejects.path, error)
            return None


def stand_in(images: int) -> dict:
    """A row that anything should take, without loss."""
    messages = [{"role": "user", "content": "-"}, {"role": "assistant", "content": "-", "weight": 0}]
    pictures = [Image.linear_gradient("L").resize((224, 224)) for _ in range(images)]
    return {"id": "stand-in", "messages": messages, "images": pictures}


def check_length(length: int, limit: int | None, where: str = "") -> None:
    """Raises RowError when a row of `length` tokens exceeds the limit."""
    if limit is not None and length > limit:
        raise RowError(
            TOO_LONG,
            f"{length} tokens with its images, the limit is {limit}. Raise max_length, lower the image "
            "resolution, or shorten the row; nothing is truncated.",
            where,
        )


def _plain(values: Any) -> list:
    return values if isinstance(values, list) else values.tolist()


def _real_tokens(mask: Any) -> tuple[int, int]:
    mask = _plain(mask)
    start = mask.index(1)
    return start, start + sum(mask)


def _example(
    rendered: Rendered, ids: list[int], spans: list[tuple[int, int]], replacements: list[dict]
) -> Example:
    """Give loss to every token that shares a character with an answer (or with the token that ends it).

    The offsets are of the text in which the processor has expanded the images; `replacements` says how much
    longer each made it. A token that merges the header's last blank with the first word belongs to the
    answer: it is what the model must produce after the generation prompt.
    """
    ends = [r["span"][1] for r in replacements]
    gains = [0] + [r["new_span"][1] - r["span"][1] for r in replacements]
    if not replacements and max(end for _, end in spans) > len(rendered.text):
        raise RowError(
            TEMPLATE,
            "this processor changes the text without saying where, so answers cannot be located. A "
            "processor of transformers >= 5.20 that returns `text_replacement_offsets` is needed.",
        )
    while spans and tuple(spans[-1]) == (0, 0):  # a token that the tokenizer added behind the text
        spans = spans[:-1]

    def tokens(part: MessageRange) -> Turn:
        first, last = (edge + gains[bisect_right(ends, edge)] for edge in (part.start, part.end))
        start = bisect_right(spans, first, key=itemgetter(1))
        end = bisect_left(spans, last, key=itemgetter(0))
        text = rendered.text[part.start : part.end]
        offsets = tuple((max(0, a - first), max(0, b - first)) for a, b in spans[start:end])
        return Turn(start, end, part.message, text, offsets)

    labels, weights = [IGNORE] * len(ids), [0.0] * len(ids)
    turns = [turn for answer in rendered.answers if (turn := tokens(answer)).start < turn.end]
    for turn in turns:
        extent = turn.message.get("supervise", "all")
        if turn.message.get("weight", 1) != 0 and extent in ("all", "text"):
            end = _end_of_text(turn) if extent == "text" else turn.end
            labels[turn.start : end] = ids[turn.start : end]
            weights[turn.start : end] = [1.0] * (end - turn.start)
    return Example(ids, labels, weights, tuple(turns), tuple(map(tokens, rendered.prompts)))


def _end_of_text(turn: Turn) -> int:
    """Where the tokens begin that the template puts behind an answer: those that end the turn."""
    text = str(turn.message["content"]).rstrip()
    if (at := turn.text.rfind(text)) < 0:
        raise RowError(
            TEMPLATE,
            "the chat template changes the text of an unfinished answer, so its end cannot be located.",
        )
    length = at + len(text)
    return turn.start + sum(first < length for first, _ in turn.offsets)


class PreferenceCollator:
    """Collates preference rows as `DPOTrainer` expects them: all chosen answers, then all rejected ones.

    Built on `VisionCollator`, so prompts are tokenised exactly as in SFT, images are opened in the workers and nothing is
    ever cut.

    Args:
        phrases_only: no preference falls on closing tags (see `marks.phrase_mark`).
        image_weight: weight of a further pair for each row with images (conditional preference of mDPO, arXiv 2406.11839):
            its chosen answer with the images, and as the rejected side the same answer with each image replaced by a
            small part of it (`images.random_crop`), which depends on `seed` and the row's id alone. 0: none.
        image_crop: largest share of an image's area that is left.
        seed: of the crops.
        options: of `VisionCollator`, among them `image_root` and `max_length`; not `rejects_path`.

    Calling it returns the processor's tensors for 2 x pairs rows (images twice), `completion_mask` of the same shape as
    `input_ids`, and, per pair, `pair_kind` (place in `rows.PAIR_KINDS`) and `pair_weight`. The further pairs come behind
    the others. Their weights, and then those of all, are such that a weighted mean over all pairs is that over the rows
    plus `image_weight` times the further pairs' sum by the number of rows.
    """

    def __init__(
        self,
        processor,
        phrases_only: bool = False,
        image_weight: float = 0.0,
        image_crop: float = 0.2,
        seed: int = 0,
        **options,
    ):
        if options.get("rejects_path") is not None:
            raise UserError("`rejects_path`: half a pair cannot be left out. Correct or remove bad rows.")
        marks = [partial(phrase_mark, ids=verification_ids(processor.tokenizer))] if phrases_only else []
        self.collator = VisionCollator(processor, marks=marks, seed=seed, **options)
        self.phrases_only, self.image_weight = phrases_only, image_weight
        self.image_crop, self.seed = image_crop, seed

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        pairs = [preference_row(row, identity(row)) for row in rows]
        kinds, weights = ([pair[name] for pair in pairs] for name in ("pair_kind", "pair_weight"))
        chosen, rejected = map(list, zip(*map(sides, pairs), strict=True))
        if self.image_weight:
            seen = [(row, weight) for row, weight in zip(chosen, weights, strict=True) if row["images"]]
            chosen += [row for row, _ in seen]
            rejected += [self._damaged(row) for row, _ in seen]
            kinds += [IMAGE_PAIR] * len(seen)
            weights += [self.image_weight * weight for _, weight in seen]
            weights = [weight * len(kinds) / len(pairs) for weight in weights]
        batch = self.collator([*chosen, *rejected])
        batch.pop("loss_weights")
        mask = (batch.pop("labels") != IGNORE).long()
        return {
            **batch,
            "completion_mask": mask,
            "pair_kind": torch.tensor([PAIR_KINDS.index(kind) for kind in kinds]),
            "pair_weight": torch.tensor(weights),
        }

    def _damaged(self, row: dict) -> dict:
        """The row with a part of each image in its place."""
        rng = random.Random(f"{self.seed}/{row['id']}")
        pictures = (open_image(item, self.collator.image_root) for item in row["images"])
        return {**row, "images": [random_crop(picture, self.image_crop, rng) for picture in pictures]}


class RegionCollator:
    """Region rows -> the same rows with their images open (`picture`), in the data loader's workers.

    The text is rendered later: it depends on the phase, and on descriptions that do not exist yet.

    Raises RowError: an image is missing or unreadable, or is not of the size the row says.
    """

    def __init__(self, image_root: str | Path | None = None):
        self.image_root = image_root

    def __call__(self, rows: Sequence[dict]) -> dict[str, Any]:
        return {"rows": [self._open(row) for row in rows]}

    def _open(self, raw: dict) -> dict:
        row = region_row(raw)
        try:
            picture = open_image(row["image"], self.image_root)
            size = boxed_size(row["image"], self.image_root, (row["width"], row["height"]))
        except RowError as error:
            raise error.at(row["id"]) from error
        return {**region_row(row, size=size), "picture": picture}
