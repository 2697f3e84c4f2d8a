"""The weights of a checkpoint: in files of its own folder, all there, of the right shapes and types, and finite."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import nn

from ..data.model_files import read_settings
from ..errors import UserError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
SHOWN = 3
# what is none of these is quantised, and means nothing without its scales
REAL = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
FAILED_RUN = "They are of a run that failed: take an earlier checkpoint."

logger = logging.getLogger(__name__)


def local_folder(path: str | Path, revision: str | None = None) -> Path | None:
    """The folder itself, or where the Hub's files lie on this machine; None where there are none yet."""
    if Path(path).is_dir():
        return Path(path)
    try:
        cached = try_to_load_from_cache(str(path), "config.json", revision=revision)
    except ValueError:  # not a name of the Hub
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def weight_files(folder: Path, index: str = INDEX) -> list[Path]:
    """The safetensors files of a checkpoint, by its index where there are several; empty where it has none.

    Raises UserError: the index is broken, names a file outside of the folder, or one that is not there.
    """
    if index == INDEX and (folder / WHOLE).is_file():
        return [folder / WHOLE]
    path = folder / index
    if not path.is_file():
        return []
    content = read_settings(path)
    places = content.get("weight_map")
    named = isinstance(places, dict) and all(isinstance(n, str) and n for n in places.values())
    if not places or not named or not isinstance(content.get("metadata"), dict):
        raise UserError(
            f"{path}: expected the objects `metadata`, and `weight_map` with the name of each weight's file. Copy it again."
        )
    names = sorted(set(places.values()))
    for name in names:
        if (
            PureWindowsPath(name).anchor
            or PurePosixPath(name).is_absolute()
            or ".." in re.split(r"[/\\]", name)
        ):
            raise UserError(
                f"{path}: {name!r} leads out of the folder. An index names files of its own folder: copy it again."
            )
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(
            f"{path}: {len(missing)} of {len(names)} files are missing, the first is {missing[0]}. Copy the folder again, "
            "with all of them."
        )
    return [folder / name for name in names]


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file to read. Raises UserError: it is damaged, which may turn out while it is read."""
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{file}: not a whole safetensors file ({error}). It may be truncated: copy it again."
        ) from error


def stored_tensors(files: Iterable[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of safetensors files, one at a time. Raises UserError: a file is damaged."""
    for file in files:
        with opened(file) as handle:
            for name in handle.keys():  # noqa: SIM118 - the handle is no dictionary
                yield name, handle.get_tensor(name)


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], where: str | Path, cure: str) -> None:
    """Raises UserError: a weight is NaN or infinite; how many tensors have such weights is said, and the first is named."""
    broken = [name for name, tensor in tensors if not is_finite(tensor)]
    if broken:
        raise UserError(
            f"{where}: {len(broken)} tensors hold weights that are not finite (NaN or infinite), the first is {broken[0]}. "
            f"{cure}"
        )


def is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:  # there is no order of eight-bit floats
        tensor = tensor.to(torch.float32)
    # one pass without a copy; NaN is both the smallest and the largest
    return all(map(bool, torch.isfinite(torch.stack(torch.aminmax(tensor.detach())))))


def check_stored(path: str | Path, revision: str | None = None) -> dict[str, torch.Tensor] | None:
    """The tensors of the files, without their values; None where the files are not on this machine yet.

    Raises UserError: weights that are no whole safetensors files of this folder, not finite, or in two files.
    """
    folder = local_folder(path, revision)
    files = weight_files(folder) if folder is not None else []
    stored: dict[str, torch.Tensor] = {}

    def noted() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in stored_tensors(files):
            if name in stored:
                raise UserError(
                    f"{path}: {name} is in two of the files that the index names, and one of the two is not of this "
                    "checkpoint. Copy the folder again."
                )
            stored[name] = tensor.to("meta")
            yield name, tensor

    check_finite(noted(), path, FAILED_RUN)
    return stored if files else None


def check_types(path: str | Path, model: nn.Module, stored: Mapping[str, torch.Tensor]) -> None:
    """Raises UserError: weights that were read as other numbers than they are: quantised ones without what scales them, or
    such as are too large for the model's dtype."""
    if getattr(model, "hf_quantizer", None) is not None:
        return
    state = model.state_dict()
    # by the last part of the name: a model's own names may differ from those in its files
    kinds = {_last(name) for name, tensor in state.items() if tensor.is_floating_point()}
    refuse_codes({name: t for name, t in stored.items() if _last(name) in kinds}, path)
    widest = max((torch.finfo(t.dtype).max for t in stored.values() if t.dtype in REAL), default=0.0)
    if widest > 2 * torch.finfo(model.dtype).max:
        check_finite(
            state.items(),
            f"{path} in {str(model.dtype).removeprefix('torch.')}",
            "The numbers in the files are too large for it: take `dtype: bfloat16` or float32.",
        )


def refuse_codes(stored: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Raises UserError: weights that are no real numbers of 16 bits or more."""
    if codes := [name for name, tensor in stored.items() if tensor.dtype not in REAL]:
        kind = str(stored[codes[0]].dtype).removeprefix("torch.")
        raise UserError(
            f"{path}: {len(codes)} weights are no real numbers of 16 bits or more, the first is {codes[0]} ({kind}), and no "
            "`quantization_config` says what they stand for. Take the weights in bfloat16, or the settings that belong to "
            "them."
        )


def check_loaded(path: str | Path, model: nn.Module, info: dict[str, Any]) -> None:
    """Raises UserError: weights that transformers made up because the checkpoint lacks them, has them in another shape, or
    under other names; or layers of the checkpoint that the model has not.

    Args:
        info: transformers' `output_loading_info`.
    """
    state = model.state_dict()
    # counters and positions are the same in every model
    missing = sorted(n for n in info["missing_keys"] if n not in state or state[n].is_floating_point())
    unexpected = sorted(info["unexpected_keys"])
    shapes = sorted(info["mismatched_keys"])
    if missing:
        other = ""
        if unexpected:
            other = f" The files have {len(unexpected)} others, the first is {unexpected[0]}."
            heads = {name.split(".")[0] for name in unexpected}
            if len(heads) == 1 and heads.isdisjoint(name.split(".")[0] for name in missing):
                other += (
                    f" All begin with `{heads.pop()}.`: save the model that was wrapped, not its wrapper."
                )
        raise UserError(
            f"{path}: {len(missing)} of {len(state)} weights are missing, the first is {missing[0]}.{other} Copy the folder "
            "again, with all its files; weights are never made up."
        )
    if shapes:
        name, stored, expected = shapes[0]
        raise UserError(
            f"{path}: {len(shapes)} of {len(state)} weights have another shape than config.json says, the first is {name}: "
            f"{list(stored)} in the file, {list(expected)} expected. Take both files from one checkpoint."
        )
    known = {_pattern(name) for name in state}
    if layers := [name for name in unexpected if _pattern(name) in known]:
        raise UserError(
            f"{path}: {len(layers)} weights are of layers that config.json does not have, the first is {layers[0]}. "
            "Take both files from one checkpoint."
        )
    if unexpected:
        shown = ", ".join(unexpected[:SHOWN]) + (", …" if len(unexpected) > SHOWN else "")
        logger.warning("%s: %d tensors are not used by this model: %s", path, len(unexpected), shown)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


@contextmanager
def without_loading_report() -> Iterator[None]:
    """Keep transformers from telling of missing weights: `check_loaded` says it in one message."""
    log = logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return not any(
            words in record.getMessage() for words in ("LOAD REPORT", "This checkpoint seem corrupted")
        )

    log.addFilter(is_other)
    try:
        yield
    finally:
        log.removeFilter(is_other)
