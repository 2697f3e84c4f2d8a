"""What an evaluation depends on, written beside its samples, so that a folder never mixes two configurations."""

import hashlib
import json
import platform
from importlib import metadata
from pathlib import Path

from .errors import UserError
from .io import read_json, write_json

RUN_FILE = "run.json"
_SMALL_FILES = (
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
_BLOCK, _BLOCKS = 1 << 20, 64


def file_digest(path: Path, *, whole: bool = False) -> str:
    """Of the whole file up to 64 MiB, else of 64 blocks spread over it: reading 15 GB at every start is no option.

    Args:
        whole: read it all, whatever its size; 16 digits.
    """
    if whole:
        with open(path, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()[:16]
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as handle:
        if size <= _BLOCK * _BLOCKS:
            digest.update(handle.read())
        else:
            for block in range(_BLOCKS):
                handle.seek((size - _BLOCK) * block // (_BLOCKS - 1))
                digest.update(handle.read(_BLOCK))
    return digest.hexdigest()


def model_digest(folder: str | Path) -> str:
    """Changes when weights, tokenizer, template or preprocessing of a checkpoint folder change."""
    folder = Path(folder)
    digest = hashlib.sha256()
    for path in sorted((*folder.glob("*.safetensors"), *(folder / name for name in _SMALL_FILES))):
        if path.is_file():
            digest.update(f"{path.name} {file_digest(path)}\n".encode())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("vlm-sft-rl", "torch", "transformers", "trl", "peft", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def flatten(value, prefix: str = "") -> dict[str, object]:
    """Nested maps as one with dotted keys."""
    if isinstance(value, dict) and value:
        return {k: v for key, item in value.items() for k, v in flatten(item, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}


def _changed(folder: Path, config: dict) -> list[tuple[str, object, object]]:
    old, new = flatten(read_json(folder / RUN_FILE)), flatten(json.loads(json.dumps(config)))
    return [(key, old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)]


def is_claimed(folder: Path, config: dict) -> bool | None:
    """True when `folder` is the place of this configuration, else None."""
    return True if (folder / RUN_FILE).is_file() and not _changed(folder, config) else None


def claim(folder: Path, config: dict, *, overwrite: bool = False) -> None:
    """Make `folder` the place of this configuration, or check that it already is.

    Args:
        config: everything the answers depend on; JSON values.
        overwrite: throw away what another configuration left there.

    Raises:
        UserError: the folder holds answers of another configuration; the message lists what changed.
    """
    if (folder / RUN_FILE).is_file():
        changed = _changed(folder, config)
        if not changed and not overwrite:
            return
        if not overwrite:
            shown = "; ".join(f"{key}: {old!r} -> {new!r}" for key, old, new in changed[:5])
            more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise UserError(
                f"{folder}: holds answers of another configuration ({shown}{more}). Give another --output-dir, "
                "or --overwrite to throw those answers away."
            )
    elif not overwrite and list(folder.glob("samples*.jsonl")):
        raise UserError(
            f"{folder}: holds samples but no {RUN_FILE}, so it cannot be told what made them. Give another "
            "--output-dir, or --overwrite to throw them away."
        )
    if overwrite:
        for stale in (*folder.glob("samples*.jsonl"), folder / "summary.json", folder / "report.html"):
            stale.unlink(missing_ok=True)
    write_json(folder / RUN_FILE, config)
