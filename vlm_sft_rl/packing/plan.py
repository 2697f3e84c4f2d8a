"""Which rows go into one pack: rows about one image together, up to so many rows or tokens.

The plan is made once, before training, from the images' names and the rows' lengths; it depends on these and a seed
alone. A pack is then one item of a `PackedDataset`, so that shuffling, sharding over processes and going on after a stop
are the data loader's, as for any other dataset.
"""

import hashlib
import json
import os
import random
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image

from ..data.chat import encode_text, image_end
from ..data.collators import VisionCollator
from ..data.fields import PICTURES, row_images
from ..data.images import image_key, image_size
from ..data.rejects import identity
from ..data.rows import sft_row
from ..errors import RowError

OPEN_PACKS = 64
CHUNK = 1000
PARALLELISM = "TOKENIZERS_PARALLELISM"


class Size(NamedTuple):
    """What a row takes of a pack's capacity.

    Attributes:
        total: its tokens (or 1, where rows are counted).
        shared: how many of these the first row of its image has already brought.
        head: names the words up to the last image, which rows that share have in common.
    """

    total: int
    shared: int = 0
    head: str = ""


class PackedDataset:
    """A map-style dataset of packs: `{"rows": [row, …]}`, which `PackedCollator` takes apart.

    Args:
        rows: any dataset with `rows[i]`.
        plan: the numbers of the rows in each pack.
    """

    def __init__(self, rows: Any, plan: Sequence[Sequence[int]]):
        self.rows, self.plan = rows, plan

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> dict[str, list[dict]]:
        return {"rows": [self.rows[i] for i in self.plan[index]]}


def plan_packs(
    keys: Sequence[Hashable | None], sizes: Sequence[Size], capacity: int, seed: int = 0
) -> list[list[int]]:
    """Put every row into exactly one pack.

    Rows of one key stay together as far as they fit; what does not fit goes to further packs. The order of keys, and
    of rows within a key, is drawn under the seed. Each pack takes what fits best among the next few dozen packs still
    open (best fit), so hardly any capacity is left over. A row larger than the capacity is a pack of its own.

    Args:
        keys: the rows' images; None for a row that shares with none.
        sizes: the rows' sizes.
        capacity: of a pack.
    """
    draw = random.Random(seed)
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(("row", i) if key is None else ("image", key), []).append(i)
    order = list(groups.values())
    draw.shuffle(order)
    packs: list[list[int]] = []
    open_packs: dict[int, int] = {}  # number of the pack -> capacity left
    for group in order:
        draw.shuffle(group)
        for chunk, size in _chunks(group, sizes, capacity):
            fits = [number for number, left in open_packs.items() if left >= size]
            if fits:
                number = min(fits, key=open_packs.__getitem__)
                packs[number] += chunk
            else:
                number = len(packs)
                packs.append(list(chunk))
                open_packs[number] = capacity
            open_packs[number] -= size
            if open_packs[number] <= 0:
                del open_packs[number]
            elif len(open_packs) > OPEN_PACKS:
                del open_packs[min(open_packs, key=open_packs.__getitem__)]
    return packs


def _chunks(group: Sequence[int], sizes: Sequence[Size], capacity: int) -> Iterator[tuple[list[int], int]]:
    """Cut the rows of one image into runs that fit; yields each with its size."""
    chunk: list[int] = []
    taken = 0
    for i in group:
        more = sizes[i].total - (sizes[i].shared if chunk else 0)
        if chunk and taken + more > capacity:
            yield chunk, taken
            chunk, taken, more = [], 0, sizes[i].total
        chunk.append(i)
        taken += more
    yield chunk, taken


def image_keys(dataset: Any) -> list[Hashable | None]:
    """For each row what names its images, None where it has none. Images are not decoded.

    Args:
        dataset: a `datasets.Dataset` or any sequence of rows.
    """
    columns = getattr(dataset, "column_names", None) or ()
    names = [name for name in PICTURES if name in columns]
    if not names:
        return [_key(sft_row(row, f"row {i}")["images"]) for i, row in enumerate(dataset)]
    # as Arrow tables: any other format would decode every picture
    table = dataset.select_columns(names).with_format("arrow")
    return [
        _key(row_images(row, f"row {i}"))
        for start in range(0, len(dataset), CHUNK)
        for i, row in enumerate(table[start : start + CHUNK].to_pylist(), start)
    ]


def _key(images: list) -> Hashable | None:
    return tuple(map(image_key, images)) or None


# How many tokens a row takes, without preparing its pictures.
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

        Raises RowError: the row cannot be used (unless the collator skips such rows: it then counts as one token, and
        the collator records it when its turn comes).
        """
        collator = self.collator
        try:
            row = collator.read(raw)
            text = collator.renderer.render(row).text
            extra = sum(self._expand(image_size(item, collator.image_root)) - 1 for item in row["images"])
        except RowError as error:
            if collator.rejects is None:
                raise error.at(identity(raw)) from error
            return Size(1)
        total = self._tokens(text) + extra
        if not row["images"]:
            return Size(total)
        head = text[: image_end(collator.processor, text)]
        return Size(total, self._tokens(head) + extra, hashlib.sha256(head.encode()).hexdigest()[:16])

    def fingerprint(self, dataset_fingerprint: str) -> str:
        """A name for the counts of a dataset that changes with anything they depend on."""
        processor, collator = self.collator.processor, self.collator
        parts = [
            dataset_fingerprint,
            processor.tokenizer.backend_tokenizer.to_str(),
            processor.chat_template,
            processor.image_processor.to_json_string(),
            [collator.hint_probability, collator.seed, str(collator.image_root), collator.rejects is None],
        ]
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]

    def _tokens(self, text: str) -> int:
        return len(encode_text(self.collator.processor, text))

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
    environment = os.environ
    parallelism = environment.get(PARALLELISM)
    try:
        counted = dataset.map(
            _columns if processes is None else _columns_in_worker,
            fn_kwargs={"counter": counter},
            remove_columns=dataset.column_names,
            num_proc=processes,
            new_fingerprint=counter.fingerprint(dataset._fingerprint),
            desc="counting tokens",
        )
    finally:
        if os.environ is not environment:
            # datasets leaves a copy in its place, which whoever held the mapping before (rich) does not see change
            os.environ = environment  # noqa: B003
            if parallelism is None:
                environment.pop(PARALLELISM, None)
            else:
                environment[PARALLELISM] = parallelism
    return [Size(*row) for row in zip(*(counted[name] for name in Size._fields), strict=True)]


def _columns(row: dict, counter: TokenCounter) -> dict[str, int]:
    return counter(row)._asdict()


def _columns_in_worker(row: dict, counter: TokenCounter) -> dict[str, int]:
    # a forked process has none of its parent's OpenMP threads and would wait for them without end
    torch.set_num_threads(1)
    return _columns(row, counter)
