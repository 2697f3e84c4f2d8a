"""A checkpoint under the names by which vLLM reads it.

transformers 5 writes a tower of CLIP or SigLIP as `vision_tower.X`; the published checkpoints of LLaVA have
`vision_tower.vision_model.X`, and vLLM 0.32 knows nothing else. InternVL's tower is `vision_tower.X` to both.
"""

import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from ..data.model_files import read_settings
from ..errors import UserError
from ..io import UNFINISHED, make_folder, write_json, writing
from .weights import INDEX, stored_tensors, weight_files

_TOWERS = ("clip_vision_model", "siglip_vision_model")
_TOWER = re.compile(
    r"^((?:model\.)?vision_tower\.)(?=(?:embeddings|encoder|pre_layrnorm|post_layernorm|head)\.)"
)


def vllm_name(name: str) -> str:
    """The name under which vLLM looks for a tensor of a model whose tower is CLIP or SigLIP."""
    return _TOWER.sub(r"\1vision_model.", name)


def for_vllm(model: str | Path, place: str | Path | None = None) -> Path:
    """The checkpoint itself where vLLM reads its names; else a copy under names that it reads. Files without such names are
    linked, so the copy of a large model takes the space of its tower's file.

    Args:
        place: the folder that the copy is made in; by default the checkpoint's own. A copy that is there already and not
            older than the weights is taken.

    Raises UserError: an adapter, a damaged file, or `place` cannot be written to.
    """
    folder = Path(model)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: vLLM takes whole models, and this is an adapter. Merge it first: `vlm-sft-rl merge {folder} MERGED`."
        )
    tower = read_settings(folder / "config.json").get("vision_config") or {}
    if tower.get("model_type") not in _TOWERS:
        return folder
    files = weight_files(folder)
    renamed = {path for path in files if any(vllm_name(name) != name for name in _names(path))}
    if not renamed:
        return folder
    place = Path(place) if place is not None else folder
    others = sorted(path for path in folder.iterdir() if path.is_file() and path not in renamed)
    states = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in (*sorted(renamed), *others)]
    target = place / f"vllm-{hashlib.sha256(repr((str(folder.resolve()), states)).encode()).hexdigest()[:12]}"
    if target.is_dir():
        return target
    with writing(place, "Copy the checkpoint to a folder that can be written to."):
        unfinished = Path(tempfile.mkdtemp(UNFINISHED, f".{target.name}.", make_folder(place)))
        try:
            for path in others:
                _link(path, unfinished / path.name)
            for path in renamed:
                tensors = {vllm_name(name): tensor for name, tensor in stored_tensors([path])}
                save_file(tensors, unfinished / path.name, metadata={"format": "pt"})
            if (folder / INDEX).is_file():
                index = read_settings(folder / INDEX)
                index["weight_map"] = {vllm_name(name): file for name, file in index["weight_map"].items()}
                (unfinished / INDEX).unlink()
                write_json(unfinished / INDEX, index)
            for stale in place.glob("vllm-*"):
                shutil.rmtree(stale, ignore_errors=True)
            unfinished.chmod(0o755)
            try:
                unfinished.rename(target)
            except OSError:
                if not target.is_dir():  # another process was faster
                    raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return target


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as handle:
        return list(handle.keys())


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or no right to
        target.symlink_to(source.resolve())
