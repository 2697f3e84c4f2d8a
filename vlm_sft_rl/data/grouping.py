"""Which rows go into one pack: rows about one image together, up to so many rows or tokens.

The plan is made once, before training, from the images' names and the rows' lengths; it depends on these and a seed
alone. A pack is then one item of a `PackedDataset`, so that shuffling, sharding over processes and going on after a stop
are the data loader's, as for any other dataset.
"""

import random
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

from .images import image_key
from .rows import to_row

OPEN_PACKS = 64
CHUNK = 1000


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
    name = next((name for name in ("images", "image") if name in columns), None)
    if name is None:
        return [_key(to_row(row, f"row {i}")["images"]) for i, row in enumerate(dataset)]
    # as Arrow tables: any other format would decode every picture
    table = dataset.select_columns([name]).with_format("arrow")
    return [
        _key(value)
        for start in range(0, len(dataset), CHUNK)
        for value in table[start : start + CHUNK][name].to_pylist()
    ]


def _key(images: Any) -> Hashable | None:
    if images is None:
        return None
    images = images if isinstance(images, list | tuple) else [images]
    return tuple(map(image_key, images)) or None
