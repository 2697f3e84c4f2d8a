"""Stages: pieces of work in folders of their own, each under a manifest of everything its result depends on."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..io import read_json, write_json

BEGUN, DONE = "stage.begun.json", "stage.json"


def digest(value: Any) -> str:
    """Of a file's content (a path), or of a JSON value."""
    if isinstance(value, Path):
        try:
            return hashlib.sha256(value.read_bytes()).hexdigest()[:16]
        except OSError as error:
            raise UserError(f"{value}: cannot be read ({error.strerror}). Check the path.") from error
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_stage(folder: str | Path, manifest: Mapping[str, Any], action: Callable[[], Any]) -> bool:
    """Do `action` unless it was finished under the same manifest; True when it was done now.

    The manifest is written before (so that a killed stage goes on under the same settings alone) and after (so that a
    stage counts as done only when it is). `action` must go on where it was stopped.

    Raises:
        UserError: the folder holds a stage, finished or begun, with another manifest; what changed is listed.
    """
    folder = Path(folder)
    wanted = json.loads(json.dumps(manifest))
    for name in (DONE, BEGUN):
        path = folder / name
        if not path.is_file():
            continue
        found = read_json(path)
        if found != wanted:
            raise UserError(_changed(folder, found, wanted))
        if name == DONE:
            return False
    write_json(folder / BEGUN, wanted)
    action()
    write_json(folder / DONE, wanted)
    return True


def is_done(folder: str | Path) -> bool:
    return (Path(folder) / DONE).is_file()


def _changed(folder: Path, found: dict, wanted: dict) -> str:
    old, new = _flat(found), _flat(wanted)
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    shown = "; ".join(f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys[:5])
    more = f"; and {len(keys) - 5} more" if len(keys) > 5 else ""
    return (
        f"{folder}: made with other settings or files ({shown}{more}). Nothing was changed. Choose another output_dir; or "
        "go back to the old settings; or delete this folder and those of later rounds to make them anew."
    )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}
