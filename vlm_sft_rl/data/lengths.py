"""How many tokens a row takes, without preparing its pictures."""

import hashlib
import json
from typing import Any

import torch
from PIL import Image

from .collators import VisionCollator, place
from .grouping import Size
from .hints import add_hints
from .images import image_size
from .problems import RowError
from .rows import to_row


class TokenCounter:
    """Counts a row's tokens as a collator would make them: exact text, image tokens by the images' sizes.

    A picture's header is read, not the picture. What the processor writes for an image of some size is asked of the
    processor once for each size, with a blank picture.
    """

    def __init__(self, collator: VisionCollator):
        self.collator = collator
        self._expansions: dict[tuple[int, int], int] = {}

    def __call__(self, raw: dict) -> Size:
        """The row's tokens, and how many of them end with its last image (0 without images).

        Raises:
            RowError: the row cannot be used (unless the collator skips such rows: it then counts as one token, and the
                collator records it when its turn comes).
        """
        collator = self.collator
        try:
            row = add_hints(to_row(raw, place(raw)), collator.hint_probability, collator.seed)
            text = collator.renderer.render(row).text
            extra = sum(self._expand(image_size(item, collator.image_root)) - 1 for item in row["images"])
        except RowError as error:
            if collator.on_bad_row == "error":
                raise error.at(place(raw)) from error
            return Size(1)
        total = self._tokens(text) + extra
        if not row["images"]:
            return Size(total)
        token = collator.processor.image_token
        head = text[: text.rindex(token) + len(token)]
        return Size(total, self._tokens(head) + extra, hashlib.sha256(head.encode()).hexdigest()[:16])

    def fingerprint(self, dataset_fingerprint: str) -> str:
        """A name for the counts of a dataset that changes with anything they depend on."""
        processor, collator = self.collator.processor, self.collator
        parts = [
            dataset_fingerprint,
            processor.tokenizer.backend_tokenizer.to_str(),
            processor.chat_template,
            processor.image_processor.to_json_string(),
            [collator.hint_probability, collator.seed, str(collator.image_root), collator.on_bad_row],
        ]
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]

    def _tokens(self, text: str) -> int:
        special = not self.collator.renderer.has_bos
        return len(self.collator.processor.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _expand(self, size: tuple[int, int]) -> int:
        """Tokens that the processor writes in the place of one image of this size."""
        if size not in self._expansions:
            processor = self.collator.processor
            features = processor(text=[processor.image_token], images=[[Image.new("RGB", size)]])
            bare = processor.tokenizer(processor.image_token)["input_ids"]
            self._expansions[size] = len(features["input_ids"][0]) - len(bare) + 1
        return self._expansions[size]


def count_tokens(dataset: Any, counter: TokenCounter, processes: int | None = None) -> list[Size]:
    """The sizes of all rows; of a `datasets.Dataset` in parallel, kept in its cache for the next run."""
    if not hasattr(dataset, "map"):
        return [counter(row) for row in dataset]
    counted = dataset.map(
        _columns if processes is None else _columns_in_worker,
        fn_kwargs={"counter": counter},
        remove_columns=dataset.column_names,
        num_proc=processes,
        new_fingerprint=counter.fingerprint(dataset._fingerprint),
        desc="counting tokens",
    )
    return [Size(*row) for row in zip(*(counted[name] for name in Size._fields), strict=True)]


def _columns(row: dict, counter: TokenCounter) -> dict[str, int]:
    return counter(row)._asdict()


def _columns_in_worker(row: dict, counter: TokenCounter) -> dict[str, int]:
    # a forked process has none of its parent's OpenMP threads and would wait for them without end
    torch.set_num_threads(1)
    return _columns(row, counter)
