"""The collator: rows -> processor tensors, labels and loss weights; nothing is cut or dropped in silence."""

import logging
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import FORMAT, MIXED, NO_SUPERVISION, PROCESSOR, TAGS, TEMPLATE, TOO_LONG, RowError, UserError
from ..io import read_jsonl
from .chat import ChatRenderer, MessageRange, Rendered
from .images import open_image
from .marks import IGNORE, Example, Mark, Turn, add_hints
from .rejects import Rejects, identity
from .rows import below_a_pixel, check_box, read_raw, strip_none, to_row
from .tags import TagError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A row whose text is rendered and whose images are open. One text branch over its images."""

    row: dict
    rendered: Rendered
    images: list

    @property
    def where(self) -> str:
        return place(self.row)


class VisionCollator:
    """Collates rows for any Hugging Face vision-language processor.

    Args:
        processor: the model's processor, with a fast tokenizer and a chat template.
        image_root: folder that image paths are relative to and may not leave.
        marks: functions `Example -> Example` applied in order (see `marks`).
        max_length: limit in tokens, images included. A longer row is a bad row; nothing is ever truncated.
        on_bad_row: "error" raises; "skip" leaves the row out, counts it and writes it to `rejects_path`.
        rejects_path: JSONL of `{"id", "source", "kind", "reason"}`, one line a row whatever number of workers,
            processes and epochs met it (see `rejects.Rejects`); required with "skip".
        hint_probability: see `hints.add_hints`; 0.2 in REVERSE.
        seed: of the hints.
        padding_side: "right" for training; None takes the tokenizer's.
        pad_to_multiple_of: pad the token length up to a multiple.
        always_image: give a batch without images one more row, with a small picture and no loss. On several processes
            a batch that leaves the vision tower out would wait for ever for the others, which use it.

    Calling it returns the processor's tensors for the batch plus `labels` (batch, length), int64, -100 where
    there is no loss, and `loss_weights` (batch, length), float32, 0 where there is no loss. When every row
    of a batch is skipped, one stand-in without loss is returned (text only, where the processor takes that),
    because a dataloader must return something.

    Attributes:
        rejects: the file of skipped rows, shared with all processes; None with "error".

    Raises:
        UserError: bad arguments. RowError: a bad row with on_bad_row="error".
    """

    def __init__(
        self,
        processor,
        image_root: str | Path | None = None,
        marks: Sequence[Mark] = (),
        max_length: int | None = None,
        on_bad_row: str = "error",
        rejects_path: str | Path | None = None,
        hint_probability: float = 0.0,
        seed: int = 0,
        padding_side: str | None = "right",
        pad_to_multiple_of: int | None = None,
        always_image: bool = False,
    ):
        if on_bad_row not in ("error", "skip"):
            raise UserError(f'on_bad_row must be "error" or "skip", not {on_bad_row!r}.')
        if on_bad_row == "skip" and rejects_path is None:
            raise UserError(
                'on_bad_row="skip" needs rejects_path, the file that skipped rows are written to.'
            )
        if not 0 <= hint_probability <= 1:
            raise UserError(f"hint_probability must be between 0 and 1, not {hint_probability!r}.")
        if not getattr(getattr(processor, "tokenizer", None), "is_fast", False):
            raise UserError(
                "VisionCollator needs a processor with a fast tokenizer (it uses character offsets)."
            )
        self.processor, self.image_root = processor, image_root
        self.marks, self.max_length = tuple(marks), max_length
        self.on_bad_row, self.rejects_path = on_bad_row, rejects_path
        self.hint_probability, self.seed = hint_probability, seed
        self.padding_side, self.pad_to_multiple_of = padding_side, pad_to_multiple_of
        self.renderer = ChatRenderer(processor)
        self.rejects = Rejects(rejects_path) if on_bad_row == "skip" else None
        self.always_image = False
        if always_image and (reason := self.trial(0, 1)) is not None:
            logger.warning("this processor takes no rows without images beside rows with them (%s)", reason)
        self.always_image = always_image and reason is None

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        prepared = [p for row in rows if (p := self._guard(self.prepare, row)) is not None]
        features, examples = self._together(prepared)
        if not examples:
            logger.warning("every row of a batch was skipped; the reasons are in %s", self.rejects_path)
            features, examples = self._process([self.prepare(self._stand_in())])
        return self._tensors(features, examples)

    @property
    def rejected(self) -> Counter:
        """Skipped rows by kind, those of other processes included."""
        return self.rejects.counts() if self.rejects else Counter()

    def trial(self, *images: int) -> str | None:
        """Why the processor refuses a batch of rows with so many images each; None when it takes it."""
        try:
            self._process([self.prepare(stand_in(count)) for count in images])
        except RowError as error:
            return error.reason
        return None

    def encode(self, row: dict) -> Example:
        """One row alone, without padding: what `__call__` would train on. Raises RowError for a bad row."""
        return self._encode([self.prepare(row)])[1][0]

    def prepare(self, raw: dict) -> Prepared:
        """Normalise a row, add its hints, render its text and open its images. Raises RowError."""
        row = to_row(raw, place(raw))
        row = add_hints(row, self.hint_probability, self.seed)
        try:
            return Prepared(row, self.renderer.render(row), [self._open(item) for item in row["images"]])
        except RowError as error:
            raise error.at(place(row)) from error

    def _together(self, prepared: list[Prepared]) -> tuple[Any, list[Example]]:
        """Encode one batch, without the rows that cannot be in it where those are to be skipped."""
        try:
            return self._encode(prepared) if prepared else (None, [])
        except RowError:
            # find the culprits one by one, then what goes together
            alone = [p for p in prepared if self._guard(lambda p: self._encode([p]), p) is not None]
        kept: list[Prepared] = []
        if len(alone) == len(prepared):
            for p in alone:
                if self._guard(lambda p: self._beside(kept, p), p) is not None:
                    kept.append(p)
        return self._together(kept or alone)

    def _beside(self, others: list[Prepared], one: Prepared) -> tuple[Any, list[Example]]:
        try:
            return self._encode([*others, one])
        except RowError as error:
            raise RowError(
                MIXED,
                f"the processor takes it alone but not beside {others[0].where} ({error.reason}) Set "
                "`per_device_train_batch_size: 1`, or train rows with and without images in runs of their own.",
                one.where,
            ) from error

    def _stand_in(self) -> dict:
        return stand_in(0 if not self.always_image and self.trial(0) is None else 1)

    def _open(self, item: Any):
        return open_image(item, self.image_root)

    def _encode(self, prepared: list[Prepared]) -> tuple[Any, list[Example]]:
        alone = self.always_image and not any(p.images for p in prepared)
        features, examples = self._process([*prepared, *([self.prepare(stand_in(1))] if alone else [])])
        finished = [self._finish(e, p) for e, p in zip(examples, prepared, strict=False)]
        return features, [*finished, *examples[len(prepared) :]]

    def _process(self, prepared: list[Prepared]) -> tuple[Any, list[Example]]:
        features, replacements = self._call_processor(prepared)
        return features, self._examples(features, prepared, replacements)

    def _call_processor(self, prepared: list[Prepared]) -> tuple[Any, list[list[dict]]]:
        """What the processor returns, and for each row what it wrote in the place of each image."""
        images = [p.images for p in prepared]
        try:
            features = self.processor(
                text=[p.rendered.text for p in prepared],
                images=images if any(images) else None,
                return_text_replacement_offsets=True,
                **self._text_kwargs(),
            )
        except Exception as error:  # each processor refuses in its own way
            names = ", ".join(p.where for p in prepared[:3]) + (" …" if len(prepared) > 3 else "")
            raise RowError(
                PROCESSOR, f"{type(self.processor).__name__} refuses it ({error}).", names
            ) from error
        return features, features.pop("text_replacement_offsets", None) or [[]] * len(prepared)

    def _text_kwargs(self) -> dict[str, Any]:
        kwargs: dict[str, Any] = {"padding": True, "truncation": False, "return_offsets_mapping": True}
        if self.renderer.has_bos:
            kwargs["add_special_tokens"] = False
        if self.padding_side:
            kwargs["padding_side"] = self.padding_side
        if self.pad_to_multiple_of:
            kwargs["pad_to_multiple_of"] = self.pad_to_multiple_of
        return kwargs

    def _examples(self, features: Any, prepared: list[Prepared], replacements: list) -> list[Example]:
        """The rows without padding; takes `offset_mapping` out of the features."""
        offsets = features.pop("offset_mapping")
        examples = []
        for i, one in enumerate(prepared):
            start, end = _real_tokens(features["attention_mask"][i])
            ids, spans = _plain(features["input_ids"][i])[start:end], _plain(offsets[i])[start:end]
            try:
                examples.append(_example(one.rendered, ids, spans, replacements[i]))
            except RowError as error:
                raise error.at(one.where) from error
        return examples

    def _finish(self, example: Example, prepared: Prepared) -> Example:
        """Apply the marks and the checks that need tokens."""
        check_length(len(example.input_ids), self.max_length, prepared.where)
        try:
            for mark in self.marks:
                example = mark(example)
        except (RowError, TagError) as error:
            kind, reason = getattr(error, "kind", TAGS), getattr(error, "reason", str(error))
            raise RowError(kind, reason, prepared.where) from error
        if all(label == IGNORE for label in example.labels):
            raise RowError(
                NO_SUPERVISION,
                "no token has loss: the answer is empty, has weight 0, or is masked out (a message with "
                '`"supervise": "verdicts"` needs the verification mark and a tag). Drop or correct the row.',
                prepared.where,
            )
        return example

    def _tensors(self, features: Any, examples: list[Example]) -> dict[str, torch.Tensor]:
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
        return {**batch, "labels": torch.from_numpy(labels), "loss_weights": torch.from_numpy(weights)}

    def _guard(self, step, item):
        """Run `step(item)`; with on_bad_row="skip" a RowError becomes a recorded reject and None."""
        try:
            return step(item)
        except RowError as error:
            if self.on_bad_row == "error":
                raise
            row = item.row if isinstance(item, Prepared) else item
            self._reject(row, error.at(place(row)))
            return None

    def _reject(self, row: dict, error: RowError) -> None:
        if self.rejects.add(row, error) == 1:
            logger.warning("skipping bad rows, see %s; the first: %s", self.rejects_path, error)


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


def place(row: dict) -> str:
    """`file:row` of a row, or its id."""
    return identity(row)


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
        if turn.message.get("weight", 1) != 0 and turn.message.get("supervise", "all") == "all":
            labels[turn.start : turn.end] = ids[turn.start : turn.end]
            weights[turn.start : turn.end] = [1.0] * (turn.end - turn.start)
    return Example(ids, labels, weights, tuple(turns), tuple(map(tokens, rendered.prompts)))


# Preference rows: `{"id", "images", "prompt", "chosen", "rejected", "pair_kind"?, "pair_weight"?}` -> DPO batches.
PAIR_KINDS = ("cot", "refine", "select", "other")


def read_pairs(path: str | Path) -> list[dict]:
    """All preference rows of a JSON or JSONL file, checked.

    Raises:
        UserError: a field is missing or of the wrong type, chosen and rejected are equal, or the file is empty.
    """
    rows = [check_pair(strip_none(raw), f"{path}, row {number}") for number, raw in read_raw(path)]
    if not rows:
        raise UserError(f"{path}: there is no pair in it.")
    return rows


def check_pair(row: dict, where: str) -> dict:
    """The row with texts as message lists and every optional field filled. Raises RowError."""
    found: dict[str, Any] = {"id": str(row.get("id", where)), "images": list(row.get("images") or [])}
    for name, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
        value = row.get(name)
        messages = [{"role": role, "content": value}] if isinstance(value, str) else value
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise RowError(FORMAT, f"field `{name}`: expected text or messages, found {value!r:.80}.", where)
        found[name] = [{"role": m.get("role", role), "content": m.get("content")} for m in messages]
    if found["chosen"] == found["rejected"]:
        raise RowError(FORMAT, "`chosen` and `rejected` are equal, so there is nothing to prefer.", where)
    kind, weight = row.get("pair_kind", "other"), row.get("pair_weight", 1.0)
    if kind not in PAIR_KINDS:
        raise RowError(FORMAT, f"`pair_kind` {kind!r} is not one of {', '.join(PAIR_KINDS)}.", where)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight < 0:
        raise RowError(FORMAT, f"`pair_weight` must be a number >= 0, found {weight!r}.", where)
    return {**found, "pair_kind": kind, "pair_weight": float(weight)}


class PreferenceCollator:
    """Collates preference rows as `DPOTrainer` expects them: all chosen answers, then all rejected ones.

    Built on `VisionCollator`, so prompts are tokenised exactly as in SFT, images are opened in the workers and nothing is
    ever cut.

    Args:
        options: of `VisionCollator`, among them `image_root` and `max_length`.

    Calling it returns the processor's tensors for 2 x pairs rows (images twice), `completion_mask` of the same shape as
    `input_ids`, and, per pair, `pair_kind` (place in `PAIR_KINDS`) and `pair_weight`.
    """

    def __init__(self, processor, **options):
        self.collator = VisionCollator(processor, **options)

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        pairs = [check_pair(strip_none(dict(row)), place(row)) for row in rows]
        sides = [_side(pair, name) for name in ("chosen", "rejected") for pair in pairs]
        batch = self.collator(sides)
        batch.pop("loss_weights")
        mask = (batch.pop("labels") != IGNORE).long()
        return {
            **batch,
            "completion_mask": mask,
            "pair_kind": torch.tensor([PAIR_KINDS.index(pair["pair_kind"]) for pair in pairs]),
            "pair_weight": torch.tensor([pair["pair_weight"] for pair in pairs]),
        }


def _side(pair: dict, name: str) -> dict:
    return {
        "id": f"{pair['id']}/{name}",
        "images": pair["images"],
        "messages": [*pair["prompt"], *pair[name]],
    }


# Region rows: boxes on images, for describing and locating.
FIELDS = ("id", "image", "width", "height", "box")


def read_regions(path: str | Path) -> list[dict]:
    """The region rows of a JSONL file.

    Raises:
        RowError: a field is missing or of the wrong kind, a box is empty or leaves its image; the row is named.
        UserError: the file cannot be read or has no rows.
    """
    rows = [check_region(row, f"{path}:{number}") for number, row in read_jsonl(path)]
    if not rows:
        raise UserError(f"{path}: no region rows. Write them with `vlm-sft-rl data convert`.")
    return rows


def check_region(row: dict, where: str = "", size: tuple[int, int] | None = None) -> dict:
    """The row with its id as text and its box as floats.

    Args:
        size: width and height of the upright image, where it was opened.

    Raises:
        RowError: a field is missing or of the wrong kind, the box is empty or leaves the image, or `size` is another.
    """
    where = where or str(row.get("id", ""))
    if missing := [field for field in FIELDS if row.get(field) is None]:
        raise RowError(
            FORMAT,
            f"a region row needs the fields {', '.join(FIELDS)}; {', '.join(missing)} missing. Convert the source file "
            "with `vlm-sft-rl data convert`.",
            where,
        )
    check_box(row["box"], where)
    width, height = (_side_regions(row, name, where) for name in ("width", "height"))
    if size is not None and (width, height) != size:
        raise RowError(
            FORMAT,
            f"fields `width`, `height`: {width} x {height}, but the image has {size[0]} x {size[1]} pixels. Boxes are in "
            "pixels of the upright image: scale them to it.",
            where,
        )
    x0, y0, x1, y1 = row["box"]
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise RowError(
            FORMAT,
            f"field `box`: {list(row['box'])} is no [x0, y0, x1, y1] inside an image of {width} x {height} pixels. Convert "
            "with --box-format xywh if these are x, y, width and height.",
            where,
        )
    if below_a_pixel(row["box"]):
        shares = (
            " They look like shares of the image: multiply them by its width and height."
            if x1 <= 1 >= y1
            else ""
        )
        raise RowError(
            FORMAT,
            f"field `box`: {list(row['box'])} is less than a pixel wide or high; boxes are in pixels.{shares}",
            where,
        )
    expressions = row.get("expressions")
    if expressions is not None and (
        not isinstance(expressions, list)
        or not expressions
        or not all(isinstance(text, str) and text.strip() for text in expressions)
    ):
        raise RowError(FORMAT, f"field `expressions`: expected texts, found {expressions!r:.80}.", where)
    return {**row, "id": str(row["id"]), "box": [float(v) for v in row["box"]]}


def _side_regions(row: dict, name: str, where: str) -> int | float:
    value = row[name]
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise RowError(FORMAT, f"field `{name}`: expected a number of pixels, found {value!r:.80}.", where)
    return value


class RegionCollator:
    """Rows -> the same rows with their images open, in the data loader's workers.

    The text is rendered later: it depends on the phase, and on descriptions that do not exist yet.

    Raises:
        RowError: an image is missing or unreadable, or is not of the size the row says.
    """

    def __init__(self, image_root: str | Path | None = None):
        self.image_root = image_root

    def __call__(self, rows: Sequence[dict]) -> dict[str, Any]:
        return {"rows": [self._open(row) for row in rows]}

    def _open(self, raw: dict) -> dict:
        row = check_region(raw)
        try:
            picture = open_image(row["image"], self.image_root)
        except RowError as error:
            raise error.at(row["id"]) from error
        return {**check_region(row, size=picture.size), "picture": picture}
