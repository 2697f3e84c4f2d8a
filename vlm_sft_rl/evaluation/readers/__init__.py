"""Readers: one function a benchmark, from files as their owners publish them to question rows, streamed.

Each takes a `Source` (the question file and where its pictures are) and the further files that the spec names, and
yields question rows: `id`, `images`, `question`, the fields that the benchmark's metric needs, and `category` where the
owners report by category.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import UserError

if TYPE_CHECKING:
    from ...data.sources.source import Source

_ANSWERS = (
    *(
        "ai2d",
        "amber",
        "easy_vqa",
        "gqa",
        "hallusion_bench",
        "haloquest",
        "m3cot",
        "mathvista",
        "mm_vet",
        "mme",
    ),
    *("mmhal", "mmmu", "mmstar", "pope", "scienceqa", "tabmwp", "tsv", "vizwiz", "vqa"),
)
_CAPTIONS = (
    "coco_captions",
    "coco_objects",
    "karpathy",
    "object_halbench",
    "ref_adv",
    "refcoco",
    "regions",
    "rows",
)
_AS_TRAINED = ("chartqa", "clevr_math", "geoqa")  # training reads the same rows
# reader -> module; imported when it is used, for the libraries that they read files with
_HOME = {
    **dict.fromkeys(_ANSWERS, ".answers"),
    **dict.fromkeys(_CAPTIONS, ".captions"),
    **dict.fromkeys(_AS_TRAINED, "...data.sources.questions"),
}
NAMES = tuple(sorted(_HOME))


def read_questions(
    name: str, source: "Source", files: Mapping[str, Path], options: Mapping
) -> Iterator[tuple[str, dict]]:
    """Yield `(where, question row)`.

    Args:
        name: a name of `NAMES`.
        files: further files by the names that the reader knows them by.
        options: further settings of the reader.

    Raises:
        UserError: a file or an option that the reader does not know, or one that it cannot do without.
        RowError: a row that cannot be used; file, row and field are named.
    """
    reader, parameters = _reader(name)
    for key in (*files, *options):
        if key not in parameters:
            raise UserError(
                f"reader {name!r}: unknown reader_options {key!r}. It has: {', '.join(sorted(parameters)) or 'none'}."
            )
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in files:
            raise UserError(f"reader {name!r}: reader_options must name the file {key!r}.")
    for number, item in enumerate(reader(source, **files, **options), 1):
        yield item if isinstance(item, tuple) else (f"{source.path}, row {number}", item)


def file_options(name: str) -> list[str]:
    """Which options of a reader are files: those that its function takes as a `Path`."""
    return [key for key, parameter in _reader(name)[1].items() if parameter.annotation is Path]


def _reader(name: str) -> tuple[Callable, dict[str, inspect.Parameter]]:
    """The reader's function, and its parameters besides the source."""
    reader = getattr(import_module(_HOME[name], __name__), name)
    parameters = dict(inspect.signature(reader).parameters)
    del parameters["source"]
    return reader, parameters
