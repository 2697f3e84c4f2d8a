"""Training files of any size as memory-mapped rows.

A source file is read once, a row at a time, into an Arrow file beside it (or in a cache folder); every
process then maps that file. The published tagged set (one JSON array of 2 GB, 1.3 million rows) never stands
in memory as Python objects. (`Dataset.from_generator` does the same in 2.2 times the time.)
"""

import hashlib
import logging
import os
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from ..errors import UserError
from ..io import open_file, replacing
from .rows import read_raw, sft_row

if TYPE_CHECKING:
    from datasets import Dataset

INDEX_VERSION = 3  # raise it when SCHEMA or the meaning of a column changes: old indexes are then made anew
BATCH_ROWS = 2000
HEAD_BYTES = 1 << 20
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "messages": pa.list_(
            pa.struct(
                {
                    "role": pa.string(),
                    "content": pa.string(),
                    "weight": pa.int8(),
                    "hint": pa.string(),
                    "answer_type": pa.string(),
                    "supervise": pa.string(),
                    "doubts": pa.list_(pa.float32()),
                }
            )
        ),
        "images": pa.list_(pa.string()),
        "source": pa.string(),
    }
)

logger = logging.getLogger(__name__)


def load_train_rows(
    path: str | Path,
    image_root: str | Path | None = None,
    subsample: int | None = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> "Dataset":
    """Open a training file of any known schema for a trainer.

    Args:
        path: JSON array or JSONL (see `rows.sft_row` for the schemas).
        image_root: folder of the images; only checked for existence here, images are opened in the collator.
        subsample: keep this many rows, drawn without replacement under `seed`, in file order; all where there are fewer.
        seed: of the subsample.
        cache_dir: where the index goes; by default `.vlm_sft_rl_index` beside the source, or in the user's
            cache folder when that cannot be written to.

    Returns:
        A memory-mapped dataset with the columns `id`, `messages`, `images` (paths) and `source` (`file:row`).

    Raises UserError: the file or the folder does not exist, the JSON is truncated, or `subsample` is below 1.
    RowError: a row has an unknown shape.
    """
    from datasets import Dataset

    if image_root is not None and not Path(image_root).is_dir():
        raise UserError(
            f"image_root {str(image_root)!r} is not a folder. Give the folder image paths start from."
        )
    return drawn(Dataset.from_file(str(index_rows(path, cache_dir))), subsample, seed, path)


def drawn(dataset: "Dataset", subsample: int | None, seed: int, path: str | Path) -> "Dataset":
    """`subsample` rows of a data set, drawn without replacement, in its order.

    Raises UserError: it has no rows, or `subsample` is below 1.
    """
    if len(dataset) == 0:
        raise UserError(f"{path}: there are no rows in it.")
    if takes_all(subsample, len(dataset), path):
        return dataset
    return dataset.select(sorted(random.Random(seed).sample(range(len(dataset)), subsample)))


def takes_all(subsample: int | None, rows: int, path: str | Path) -> bool:
    """Whether `subsample` leaves no row of a file out; said where it asks for more than there are.

    Raises UserError: it is below 1.
    """
    if subsample is None:
        return True
    if subsample < 1:
        raise UserError(f"`subsample` is {subsample}, expected an integer >= 1.")
    if subsample > rows:
        logger.warning(
            "%s: `subsample` asks for %d rows and there are %d: all are taken.", path, subsample, rows
        )
    return subsample >= rows


def index_rows(path: str | Path, cache_dir: str | Path | None = None) -> Path:
    """The Arrow file of a source file; made when there is none for its present content.

    The name carries the source's size, modification time and a hash of its first megabyte, so a changed
    source gets a new index. It appears when it is complete: a killed run leaves nothing that could be mistaken
    for an index, and two processes at once do no harm.

    Raises UserError: the source cannot be read or is truncated, or the index cannot be written.
    """
    source = Path(path)
    with open_file(source) as handle:
        state, head = os.fstat(handle.fileno()), handle.read(HEAD_BYTES)
    key = f"{INDEX_VERSION} {source.resolve()} {state.st_size} {state.st_mtime_ns} ".encode() + head
    name = f"{source.stem}-{hashlib.sha256(key).hexdigest()[:16]}.arrow"
    folders = [source.resolve().parent / ".vlm_sft_rl_index", _user_cache()]
    target = _index_folder(source, name, folders if cache_dir is None else [Path(cache_dir)]) / name
    return target if target.exists() else _write_index(target, read_raw(source), str(source))


def cached_rows(
    raw_rows: Iterable[tuple[int, dict]], label: str, key: str, cache_dir: str | Path | None = None
) -> "Dataset":
    """Rows that lie in no file, as those of a file: checked, and indexed once for each `key`.

    Args:
        raw_rows: `(number, row)`; not read when there is an index.
        label: where they are from, for messages and for `source`.
        key: changes when they do.

    Raises UserError: the index cannot be written. RowError: a row has an unknown shape.
    """
    from datasets import Dataset

    name = f"{hashlib.sha256(f'{INDEX_VERSION} {key}'.encode()).hexdigest()[:24]}.arrow"
    folders = [_user_cache() if cache_dir is None else Path(cache_dir)]
    target = _index_folder(label, name, folders) / name
    return Dataset.from_file(str(target if target.exists() else _write_index(target, raw_rows, label)))


def _write_index(target: Path, raw_rows: Iterable[tuple[int, dict]], label: str) -> Path:
    notes: Counter = Counter()
    rows = (sft_row(raw, f"{label}:{number}", notes) for number, raw in raw_rows)
    with replacing(target, "wb") as handle, pa.ipc.new_stream(handle, SCHEMA) as writer:
        while batch := list(islice(rows, BATCH_ROWS)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, SCHEMA))
    for note, count in notes.items():
        logger.warning("%s: %s in %d rows", label, note, count)
    return target


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlm_sft_rl"


def _index_folder(source: str | Path, name: str, folders: Sequence[Path]) -> Path:
    """The first folder that can be written to or has the index already."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK) or (folder / name).exists():
            return folder
    raise UserError(
        f"{folders[0]}: cannot be written to, so {source} cannot be indexed. Choose another cache_dir."
    )
