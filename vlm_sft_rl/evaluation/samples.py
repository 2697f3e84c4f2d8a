"""`samples.jsonl`: one answer a line, appended as answers come, resumable by id and shared out over processes."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import UserError
from ..io import read_jsonl, write_jsonl

SAMPLES = "samples.jsonl"


def to_sample(row: dict, prompt: str, answer: dict) -> dict:
    """The line for one answer.

    Args:
        row: the question row; all but its images and question become `reference`.
        prompt: what the model was asked.
        answer: `decoding`'s `Answer.to_json()`, for questions about boxes with `located` or `leak` (`region_systems`).
    """
    reference = {key: value for key, value in row.items() if key not in ("id", "images", "question")}
    boxes = {key: answer[key] for key in ("located", "leak") if key in answer}
    return {
        "id": row["id"],
        "images": row["images"],
        "question": row["question"],
        "prompt": prompt,
        "answer": answer["text"],
        "tagged_answer": answer["tagged_text"],
        "accepted_answer": answer["accepted_text"],
        "best_effort_answer": answer["best_effort_text"],
        "ok": answer["ok"],
        "spans": answer["spans"],
        "counts": answer["counts"],
        "trace": answer["trace"],
        "reference": reference,
        **boxes,
    }


def shard_path(folder: Path, rank: int, world_size: int) -> Path:
    """The file this process appends to."""
    return folder / (SAMPLES if world_size == 1 else f"samples.rank{rank}-of-{world_size}.jsonl")


def cut_broken_end(path: Path) -> bool:
    """Remove a last line that a killed run left unfinished. True if there was one."""
    try:
        handle = open(path, "rb+")  # noqa: SIM115 - closed below; another process may just have merged and removed it
    except FileNotFoundError:
        return False
    with handle:
        content = handle.read()
        end = content.rfind(b"\n") + 1
        if end == len(content):
            return False
        handle.truncate(end)
        handle.flush()
        os.fsync(handle.fileno())
    return True


def read_samples(path: str | Path) -> list[dict]:
    """All samples of a file or of a run's folder.

    Raises:
        UserError: there is none, a line is not a sample, or an id comes twice.
    """
    path = Path(path)
    path = path / SAMPLES if path.is_dir() else path
    samples, seen = [], {}
    for number, row in read_jsonl(path):
        missing = [
            key for key in ("id", "answer", "tagged_answer", "spans", "counts", "reference") if key not in row
        ]
        if missing:
            raise UserError(
                f"{path}, line {number}: the field {missing[0]!r} is missing; this is no samples file."
            )
        if row["id"] in seen:
            raise UserError(
                f"{path}, line {number}: the id {row['id']!r} is already on line {seen[row['id']]}."
            )
        seen[row["id"]] = number
        samples.append(row)
    if not samples:
        raise UserError(f"{path}: no samples in it. Run the evaluation again.")
    return samples


def shards(folder: Path) -> list[Path]:
    """Files that single processes of a shared run append to; merged ones are gone."""
    return sorted(folder.glob("samples.rank*.jsonl"))


def collect(folder: Path) -> dict[str, dict]:
    """Samples by id from the merged file and all shards, whatever number of processes wrote them.

    A line that is being written by another process is not read. Shards that another process merges and removes
    meanwhile are read from the merged file, which is there before they are removed.
    """
    merged = folder / SAMPLES
    while True:
        found: dict[str, dict] = {}
        try:
            # first the shards' names: if there is no merged file after that, they are all still there
            paths = shards(folder)
            for path in [merged, *paths] if merged.is_file() else paths:
                _collect_file(path, found)
        except FileNotFoundError:
            continue
        return found


def _collect_file(path: Path, found: dict[str, dict]) -> None:
    text = path.read_bytes()
    complete = text[: text.rfind(b"\n") + 1].decode("utf-8")
    for number, line in enumerate(complete.split("\n")[:-1], 1):
        try:
            sample = json.loads(line)
            found.setdefault(sample["id"], sample)
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}, line {number}: not a sample ({error}). Remove this line; the rest is kept."
            ) from error


def merge(folder: Path, ids: Sequence[str], found: dict[str, dict]) -> list[dict]:
    """Write `samples.jsonl` in question order (further samples behind) and remove the shards.

    Returns:
        The samples of `ids`, in that order.
    """
    wanted = dict.fromkeys(ids)
    further: Iterable[str] = (key for key in found if key not in wanted)
    write_jsonl(folder / SAMPLES, (found[key] for key in (*wanted, *further)))
    for path in shards(folder):
        path.unlink(missing_ok=True)
    return [found[key] for key in wanted]
