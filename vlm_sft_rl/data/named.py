"""Rows of a data set that `datasets` opens by its name: one of the Hub, a folder of files, or what `save_to_disk` wrote.

Pictures inside of it stay encoded, and where they are, until the collator opens them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ..errors import UserError, first_line, short
from .fields import PICTURES
from .index import BATCH_ROWS, cached_rows, drawn
from .model_files import HUB_NAME

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

SHUFFLE_ROWS = 1000  # of a stream are held to draw the next one from
_PICTURE = "picture"  # stands for one that lies inside of the data set


@dataclass(frozen=True)
class NamedDataset:
    """A data set by its name, as TRL's `ScriptArguments` name it; iterating gives `(number, row)`, 1-based.

    Attributes:
        name: of the Hub, or a local folder.
        config: which of its configurations.
        split: also a part of one, as in `train[:1000]`.
    """

    name: str
    config: str | None = None
    split: str = "train"

    def __str__(self) -> str:
        return f"{self.name}{'/' + self.config if self.config else ''}[{self.split}]"

    def __iter__(self) -> Iterator[tuple[int, dict]]:
        number = 0
        for table in self._tables(self.rows):
            for raw in table.to_pylist():
                number += 1
                yield number, raw

    @cached_property
    def rows(self) -> "Dataset":
        """Its rows as they are. Raises UserError: it cannot be opened."""
        return self._open(streaming=False)

    @property
    def picture_columns(self) -> list[str]:
        """Columns whose pictures lie inside of the data set; paths are text."""
        schema = self.rows.data.schema
        return [name for name in PICTURES if name in schema.names and _holds_bytes(schema.field(name).type)]

    def stream(self, seed: int) -> "IterableDataset":
        """Its rows as they come, shuffled in a window of `SHUFFLE_ROWS`; they are checked when they are collated.

        Raises UserError: it cannot be opened.
        """
        stream = self._open(streaming=True)
        return stream.decode(False).shuffle(seed=seed, buffer_size=SHUFFLE_ROWS)

    def train_rows(
        self, *, subsample: int | None = None, seed: int = 0, cache_dir: str | Path | None = None
    ) -> "Dataset":
        """SFT rows, checked one by one as those of a file are, see `index.load_train_rows`.

        Raises UserError: it cannot be opened or has no rows. RowError: a row has an unknown shape, or pictures elsewhere
        than in `image` or `images`.
        """
        from datasets import Dataset, concatenate_datasets

        columns = self.picture_columns
        if len(columns) > 1:
            raise UserError(f"{self}: pictures in `image` and in `images`. Keep one of the columns.")
        fingerprint = self.rows._fingerprint
        rows = cached_rows(self._texts(columns), str(self), f"{self} {fingerprint}", cache_dir)
        if columns:
            # without its metadata the column is plain bytes and paths, which nothing decodes
            table = self.rows.select_columns(columns).data.replace_schema_metadata(None)
            pictures = Dataset(table, fingerprint=f"{fingerprint}-pictures").rename_columns(
                {columns[0]: "images"}
            )
            rows = concatenate_datasets([rows.remove_columns("images"), pictures], axis=1)
        return drawn(rows, subsample, seed, str(self))

    def _texts(self, pictures: list[str]) -> Iterator[tuple[int, dict]]:
        """The rows with a word in the place of each picture."""
        number = 0
        others = self.rows.remove_columns(pictures)
        for start, table in enumerate(self._tables(others)):
            batch = table.to_pylist()
            for name in pictures:
                column = self.rows.data.column(name).slice(start * BATCH_ROWS, len(batch))
                for raw, count in zip(batch, _counts(column), strict=True):
                    raw[name] = [_PICTURE] * count
            for raw in batch:
                number += 1
                yield number, raw

    def _tables(self, rows: "Dataset") -> Iterator[pa.Table]:
        tables = rows.with_format("arrow")
        for start in range(0, len(rows), BATCH_ROWS):
            yield tables[start : start + BATCH_ROWS]

    def _open(self, *, streaming: bool) -> Any:
        from datasets import DatasetDict, load_dataset, load_from_disk

        folder = Path(self.name)
        if not folder.is_dir() and not HUB_NAME.fullmatch(self.name):
            raise UserError(
                f"`dataset_name`: {self.name}: no such folder, and no name of a data set on the Hub (OWNER/NAME). Rows in a "
                "file are named by `train_file`."
            )
        try:
            if not any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
                return load_dataset(self.name, self.config, split=self.split, streaming=streaming)
            saved = load_from_disk(self.name)
            if isinstance(saved, DatasetDict):
                if self.split not in saved:
                    raise UserError(
                        f"{self.name}: there is no split {self.split!r}, but {', '.join(saved)}. Set `dataset_split`."
                    )
                saved = saved[self.split]
            return saved.to_iterable_dataset() if streaming else saved
        except UserError:
            raise
        except Exception as error:  # of many types, for a name, a network and files of many kinds
            raise UserError(
                f"`dataset_name`: {short(self.name)} cannot be opened ({first_line(error)}). Check the name, "
                "`dataset_config`, `dataset_split` and the connection; without one name a local folder."
            ) from error


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _counts(column: pa.ChunkedArray) -> list[int]:
    """How many pictures each row has; no picture is read."""
    import pyarrow.compute as compute

    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return [count or 0 for count in compute.list_value_length(column).to_pylist()]
    return [int(value) for value in compute.is_valid(column).to_pylist()]
