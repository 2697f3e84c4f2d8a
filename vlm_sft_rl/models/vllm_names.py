"""A checkpoint under the names by which vLLM reads it.

transformers 5 writes a tower of CLIP or SigLIP as `vision_tower.X`; the published checkpoints of LLaVA have
`vision_tower.vision_model.X`, and vLLM 0.32 knows nothing else. InternVL's tower is `vision_tower.X` to both.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors.torch import save_file

from ..data.model_files import read_settings
from ..errors import UserError, first_line
from ..io import new_folder, write_json, writing
from ..locks import lock_open
from .weights import INDEX, opened, stored_tensors, weight_files

_TOWERS = ("clip_vision_model", "siglip_vision_model")
_TOWER = re.compile(
    r"^((?:model\.)?vision_tower\.)(?=(?:embeddings|encoder|pre_layrnorm|post_layernorm|head)\.)"
)
_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")  # of a repository
_COPIES = "vllm-" + 12 * "[0-9a-f]"


def vllm_name(name: str) -> str:
    """The name under which vLLM looks for a tensor of a model whose tower is CLIP or SigLIP."""
    return _TOWER.sub(r"\1vision_model.", name)


def for_vllm(model: str | Path) -> Path:
    """The checkpoint itself where vLLM reads its names; else a copy below its folder under names that it reads.

    Files without such names are linked, so the copy of a large model takes the space of its tower's file. A copy that is
    there already and not older than the checkpoint is taken, others are removed.

    Args:
        model: a folder, or a name on the Hub, whose files are downloaded.

    Raises UserError: an adapter, a damaged file, a folder that cannot be written to, or the Hub does not give the model.
    """
    folder = Path(model) if Path(model).exists() else _downloaded(str(model))
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: vLLM takes whole models, and this is an adapter. Merge it first: `vlm-sft-rl merge {folder} MERGED`."
        )
    tower = read_settings(folder / "config.json").get("vision_config") or {}
    if tower.get("model_type") not in _TOWERS:
        return folder
    renamed = {path for path in weight_files(folder) if _has_other_names(path)}
    if not renamed:
        return folder
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    target = (
        folder / f"vllm-{hashlib.sha256(repr((str(folder.resolve()), states)).encode()).hexdigest()[:12]}"
    )
    # the processes of one launcher come here together
    with (
        writing(folder, "Copy the checkpoint to a folder that can be written to."),
        open(folder / "config.json", "rb") as lock,
    ):
        lock_open(lock.fileno(), wait=True)
        if not target.is_dir():
            for stale in folder.glob(_COPIES):
                shutil.rmtree(stale, ignore_errors=True)
            with new_folder(target) as unfinished:
                _write(folder, files, renamed, unfinished)
    return target


def _downloaded(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except (OSError, ValueError) as error:  # of the network, of the Hub, or the name cannot be one
        raise UserError(
            f"{name}: no folder, and the Hub does not give it ({first_line(error)}). Check the path or the name."
        ) from error


def _write(folder: Path, files: Iterable[Path], renamed: Collection[Path], target: Path) -> None:
    for path in files:
        if path in renamed:
            tensors = {vllm_name(name): tensor for name, tensor in stored_tensors([path])}
            save_file(tensors, target / path.name, metadata={"format": "pt"})
            shutil.copymode(path, target / path.name)
        elif path.name == INDEX:
            index = read_settings(folder / INDEX)
            index["weight_map"] = {vllm_name(name): file for name, file in index["weight_map"].items()}
            write_json(target / INDEX, index)
        else:
            _link(path, target / path.name)


def _has_other_names(path: Path) -> bool:
    with opened(path) as handle:
        return any(vllm_name(name) != name for name in handle.keys())  # noqa: SIM118 - the handle is no dictionary


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or no right to
        target.symlink_to(source.resolve())
