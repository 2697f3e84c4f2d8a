"""Work that goes on where it was stopped: folders under a manifest, files of answers that grow, timed stages.

A manifest holds everything that a result depends on. It is written before the work begins, so that a folder never mixes
two configurations: a run under another manifest is refused, and the message names the keys that differ.
"""

import hashlib
import json
import math
import os
import platform
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import __version__
from .errors import UserError, short
from .io import append_jsonl, open_file, parse_json, write_json, write_jsonl
from .locks import Lock
from .shapes import AMOUNT, COUNT, NUMBER, Map, Number, Shape, once, read_object, require
from .workers import Engine, Work, Workers, answers_of, process_share

RUN_FILE, SAMPLES, SUMMARY = "run.json", "samples.jsonl", "summary.json"
STAGE_STARTED, STAGE_DONE = "stage.begun.json", "stage.json"
PACKAGE = Path(__file__).parent
POLL_SECONDS = 0.5
CLAIM_SECONDS = 600.0  # the first process reads questions and weights before it claims the folder
BEAT_SECONDS = 5.0  # a killed attempt at a stage is short by this at the most
BATCHES_PER_CALL = 4  # an engine replaces finished rows at once: a few batches a call keep it full
T = TypeVar("T")
ANSWER = {"id": str}
NO_ANSWER = "rows without an answer"  # those whose line has `error`, see `decode`
# a stage as `stages.json` holds it; it used to be noted by its seconds alone
STAGE = ({"seconds": AMOUNT, "done": bool, "version?": str, "made_by?": (Map(str), None)}, AMOUNT)


# --- What results depend on: digests of inputs, versions ---

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


def digest(value: Any) -> str:
    """Of a file's whole content (a path), or of a JSON value.

    Raises UserError: the file cannot be read.
    """
    if isinstance(value, Path):
        try:
            with open(value, "rb") as handle:
                return hashlib.file_digest(handle, "sha256").hexdigest()[:16]
        except OSError as error:
            raise UserError(f"{value}: cannot be read ({error.strerror}). Check the path.") from error
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """Of the whole file up to 64 MiB, else of 64 blocks spread over it: reading 15 GB at every start is no option."""
    size = path.stat().st_size
    total = hashlib.sha256(str(size).encode())
    with open(path, "rb") as handle:
        if size <= _BLOCK * _BLOCKS:
            total.update(handle.read())
        else:
            for block in range(_BLOCKS):
                handle.seek((size - _BLOCK) * block // (_BLOCKS - 1))
                total.update(handle.read(_BLOCK))
    return total.hexdigest()


def model_digest(folder: str | Path) -> str:
    """Changes when weights, tokenizer, template or preprocessing of a checkpoint folder change."""
    folder = Path(folder)
    total = hashlib.sha256()
    for path in sorted((*folder.glob("*.safetensors"), *(folder / name for name in _SMALL_FILES))):
        if path.is_file():
            total.update(f"{path.name} {file_digest(path)}\n".encode())
    return total.hexdigest()[:16]


def fingerprints(uses: Sequence[str | Path]) -> dict[str, str]:
    """A digest of each file, or of all files below each folder; text is relative to the package.

    Raises UserError: there is no such file or folder.
    """
    prints = {}
    for part in uses:
        path = PACKAGE / part
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        files = [file for file in files if "__pycache__" not in file.parts]
        if not files:
            raise UserError(f"{path}: no such file or folder.")
        total = hashlib.sha256()
        for file in files:
            total.update(f"{file.relative_to(path.parent)} {file.stat().st_size}\n".encode())
            total.update(file.read_bytes())
        prints[str(part) if isinstance(part, str) else part.name] = total.hexdigest()[:16]
    return prints


def versions() -> dict[str, str]:
    numbers = {"python": platform.python_version()}
    for name in ("vlm-sft-rl", "torch", "transformers", "trl", "peft", "numpy"):
        try:
            numbers[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            numbers[name] = "not installed"
    return numbers


# --- Manifests ---


def training_log(folder: Path, cure: str) -> list[dict]:
    """What a trainer logged, in order: entries with a `step`. Raises UserError: the file is not what a trainer writes."""
    path = folder / "trainer_state.json"
    log = read_object(path, {"log_history": [Map((NUMBER, str, bool, None, [NUMBER]))]}, cure)["log_history"]
    return [require(entry, {"step": COUNT}, str(path), cure) for entry in log]


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested maps as one with dotted keys."""
    if isinstance(value, dict) and value:
        return {k: v for key, item in value.items() for k, v in flatten(item, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}


def differences(path: Path, manifest: Mapping[str, Any]) -> str:
    """What differs from the manifest in the file `path`, `key: old -> new`; empty where nothing does."""
    cure = (
        "It is no manifest of ours, or it was edited or cut off. Choose another folder, or remove this one."
    )
    old, new = flatten(read_object(path, dict, cure)), flatten(json.loads(json.dumps(manifest)))
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    changes = "; ".join(f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys[:5])
    return changes + (f"; and {len(keys) - 5} more" if len(keys) > 5 else "")


def keep_manifest(path: Path, manifest: Mapping[str, Any], holder: str, cure: str) -> None:
    """Write the manifest, or check that the one which is there already is the same.

    Args:
        holder: what the folder holds, for the message: "holds a demo with other settings".
        cure: what to do instead.

    Raises UserError: there is another one; the message says `holder`, lists what changed, and ends with `cure`.
    """
    if path.is_file():
        if changes := differences(path, manifest):
            raise UserError(f"{path.parent}: {holder} ({changes}). {cure}")
        return
    write_json(path, manifest)


# --- Files of answers: one answer a line, appended as answers come ---


def shard_path(folder: Path, rank: int, world_size: int) -> Path:
    """The file this process appends to."""
    return folder / (SAMPLES if world_size == 1 else f"samples.rank{rank}-of-{world_size}.jsonl")


def shards(folder: Path) -> list[Path]:
    """Files that single processes of a shared run append to; merged ones are gone."""
    return sorted(folder.glob("samples.rank*.jsonl"))


def decoded_shard(folder: Path, number: int) -> Path:
    """The file of answers of one shard of `decode`, once it is finished."""
    return folder / f"shard-{number:05}.jsonl"


def answer_files(path: str | Path) -> list[Path]:
    """The files of all answers at a path, in the order of their rows: a JSONL file, or those of a folder that `decode` or
    `eval run` has finished. `samples.jsonl` in the folder of an evaluation stands for that folder.

    Raises UserError: there is nothing of the kind, or answers are still missing.
    """
    path = Path(path)
    folder = path.parent if path.name == SAMPLES else path
    cure = "Give a JSONL file of answers, or the folder of `vlm-sft-rl decode` or `eval run`."
    if not path.exists():
        raise UserError(f"{path}: no such file or folder. {cure}")
    if not (folder / RUN_FILE).is_file():
        if path.is_dir():
            raise UserError(f"{path}: no {RUN_FILE} in it. {cure}")
        return [path]
    manifest = read_object(folder / RUN_FILE, {"shard_rows?": Number(1, whole=True), "spec?": dict}, cure)
    again = "Give the command again that writes them"
    if "shard_rows" in manifest:
        count = require(manifest, {"row_count": COUNT}, str(folder / RUN_FILE), cure)["row_count"]
        files = [decoded_shard(folder, number) for number in range(-(-count // manifest["shard_rows"]))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise UserError(
                f"{folder}: {len(missing)} of its {len(files)} shards are not finished, the first is {missing[0]}. {again}: "
                "`vlm-sft-rl decode`, with each value of --part where it was given."
            )
        return files
    if "spec" in manifest and not (folder / SUMMARY).is_file():
        raise UserError(f"{folder}: its answers are not finished. {again}: `vlm-sft-rl eval run`.")
    if path.is_dir() and "spec" not in manifest:
        raise UserError(f"{path}: holds answers of another kind. {cure}")
    return [folder / SAMPLES]


def mend_end(path: Path) -> bool:
    """Remove a last line that a killed run left unfinished; True if there was one. A line that only lacks its end gets it.

    Raises UserError: the file cannot be opened, or what follows its last line is not the beginning of an answer.
    """
    if not path.exists():  # another process may just have merged and removed it
        return False
    with open_file(path, "rb+") as handle:
        content = handle.read()
        end = content.rfind(b"\n") + 1
        tail = content[end:]
        if not tail:
            return False
        if not tail.startswith(b"{"):
            raise UserError(
                f"{path}: after its last line come {len(tail)} bytes that are no answer ({short(tail, 40)}). Remove them, "
                "or the file; the lines before them are kept."
            )
        try:
            json.loads(tail)
        except ValueError:
            handle.truncate(end)
        else:
            handle.write(b"\n")
        handle.flush()
        os.fsync(handle.fileno())
    return True


def collect(folder: Path, shape: Shape = ANSWER) -> dict[str, dict]:
    """Answers by id from the merged file and all shards, whatever number of processes wrote them.

    A line that is being written by another process is not read. Shards that another process merges and removes
    meanwhile are read from the merged file, which is there before they are removed.

    Raises UserError: a line has not this shape, or a file has an id twice.
    """
    merged = folder / SAMPLES
    while True:
        answers: dict[str, dict] = {}
        try:
            # first the shards' names: if there is no merged file after that, they are all still there
            paths = shards(folder)
            for path in [merged, *paths] if merged.exists() else paths:
                _collect_file(path, answers, shape)
        except FileNotFoundError:
            continue
        return answers


def _collect_file(path: Path, answers: dict[str, dict], shape: Shape) -> None:
    if path.is_dir():
        raise UserError(f"{path}: a folder stands where answers are written. Remove it.")
    check = once(path, "id")
    for number, sample in whole_lines(path, shape):
        check(sample, number)
        answers.setdefault(sample["id"], sample)


def whole_lines(path: Path, shape: Shape) -> Iterator[tuple[int, dict]]:
    """Numbers and answers of a file that may be growing: a last line without its end is not read.

    Raises UserError: a line has not this shape.
    """
    content, cure = path.read_bytes(), "Remove this line; the rest is kept."
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].split(b"\n")[:-1], 1):
        where = f"{path}, line {number}"
        try:
            answer = parse_json(line.decode(), path, number, cure)
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 text ({error.reason}). {cure}") from error
        yield number, require(answer, shape, where, cure)


def merge(folder: Path, ids: Sequence[str], answers: dict[str, dict]) -> list[dict]:
    """Write `samples.jsonl` in question order (further answers behind) and remove the shards.

    Returns:
        The answers of `ids`, in that order.
    """
    order = dict.fromkeys(ids)
    further: Iterable[str] = (key for key in answers if key not in order)
    write_jsonl(folder / SAMPLES, (answers[key] for key in (*order, *further)))
    for path in shards(folder):
        path.unlink(missing_ok=True)
    return [answers[key] for key in order]


# --- A folder of answers: claimed once, filled by any number of processes ---


@dataclass(frozen=True)
class Run:
    """A folder that belongs to one configuration, as this process sees it.

    Attributes:
        rank, world_size: this process among those that fill the folder together.
        answers: what had been answered when this process came, by id.
        shape: of an answer.
        lock: held as long as the run is in use.
    """

    folder: Path
    rank: int
    world_size: int
    answers: dict[str, dict]
    shape: Shape
    lock: Lock


class Answers(NamedTuple):
    """The answers in the questions' order (empty in all processes but the first), and how many questions this process
    put to the model for them."""

    lines: list[dict]
    new: int


def wait_for(attempt: Callable[[], T | None], failure: str, timeout: float = math.inf) -> T:
    """Poll until `attempt` gives something. Without a limit where a process may work for hours: the launcher ends
    all processes when one fails."""
    started = time.monotonic()
    while (result := attempt()) is None:
        if time.monotonic() - started > timeout:
            raise UserError(f"{failure} within {timeout:.0f} s. Look at the messages of the other processes.")
        time.sleep(POLL_SECONDS)
    return result


def claim(
    folder: str | Path, config: Mapping[str, Any], shape: Shape = ANSWER, *, overwrite: bool = False
) -> Run:
    """Make `folder` the place of this configuration, or check that it already is. The first process does; others wait.

    Args:
        config: everything the answers depend on; JSON values.
        shape: of an answer; at the least it has an `id`.
        overwrite: throw away what another configuration left there.

    Raises UserError: the folder holds answers of another configuration (the message lists what changed) or something else
    than answers, another process is at work there, or nothing can be written.
    """
    folder, (rank, world_size) = Path(folder), process_share()
    lock = Lock(folder)
    if overwrite and world_size > 1:
        raise UserError(
            f"--overwrite works in a single process only. Remove {folder} and start again without it."
        )
    manifest = folder / RUN_FILE
    if rank > 0:
        wait_for(
            lambda: True if manifest.is_file() and not differences(manifest, config) else None,
            f"{folder}: the first process did not claim it",
            CLAIM_SECONDS,
        )
    else:
        if overwrite:
            stale = (*folder.glob("samples*.jsonl"), folder / SUMMARY, folder / "report.html", manifest)
            for path in stale:
                path.unlink(missing_ok=True)
        elif not manifest.is_file() and list(folder.glob("samples*.jsonl")):
            raise UserError(
                f"{folder}: holds samples but no {RUN_FILE}, so it cannot be told what made them. Give another "
                "--output-dir, or --overwrite to throw them away."
            )
        keep_manifest(
            manifest,
            config,
            "holds answers of another configuration",
            "Give another --output-dir, or --overwrite to throw those answers away.",
        )
    mend_end(shard_path(folder, rank, world_size))
    return Run(folder, rank, world_size, collect(folder, shape), shape, lock)


def answer_all(
    run: Run,
    questions: Sequence[dict],
    load: Callable[[], Engine],
    *,
    per_call: int,
    open: Callable[[dict], dict] | None = None,
    workers: Workers | None = None,
    ids: Callable[[dict], Sequence[str]] = lambda question: [question["id"]],
    label: str = "answers",
    console: Console | None = None,
) -> Answers:
    """Put the unanswered questions to a model and append each answer to the run's folder as it comes.

    Killed at any moment, the same call goes on after the last answer that was written. Each process takes its share
    of the questions; the first one waits for the others and merges what they wrote.

    Args:
        load: makes the engine (loads a model); called only where something is missing.
        per_call: questions given to the engine at once; a killed run loses one call of each worker at the most.
        open: see `Work`.
        workers: who answers, where it is not this process.
        ids: the ids of a question's answers.
        label: of the progress bar.

    Raises UserError: the disk is full, or questions got no answer.
    """
    todo = [
        question
        for question in questions[run.rank :: run.world_size]
        if any(name not in run.answers for name in ids(question))
    ]
    if todo:
        missing = {name for question in todo for name in ids(question)} - run.answers.keys()
        file = shard_path(run.folder, run.rank, run.world_size)
        calls = [todo[start : start + per_call] for start in range(0, len(todo), per_call)]
        work = Work(load, per_call, read=iter, open=open)
        with answer_progress(label, len(missing), console or Console(quiet=run.rank > 0)) as advance:
            for lines in answers_of(work, calls, workers):
                lines = [line for line in lines if line["id"] in missing]
                append_jsonl(file, lines)
                missing.difference_update(line["id"] for line in lines)
                advance(len(lines))
        if failed := sum(not missing.isdisjoint(ids(question)) for question in todo):
            raise UserError(
                f"{run.folder}: {failed} of {len(todo)} prompts got no answer. What was answered is kept: give the same "
                "command again to ask for the rest."
            )
    if run.rank > 0:
        return Answers([], len(todo))
    names = [name for question in questions for name in ids(question)]

    def complete() -> dict[str, dict] | None:
        answers = collect(run.folder, run.shape)
        return answers if answers.keys() >= set(names) else None

    answers = wait_for(complete, f"{run.folder}: another process stopped")
    return Answers(merge(run.folder, names, answers), len(todo))


@contextmanager
def answer_progress(label: str, total: int, console: Console) -> Iterator[Callable[[int], None]]:
    """A bar with the answers a second; yields the function that counts some."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    started = time.monotonic()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=total, rate="")

        def advance(count: int) -> None:
            progress.update(task, advance=count)
            rate = progress.tasks[0].completed / (time.monotonic() - started)
            progress.update(task, rate=f"{rate:.1f}/s")

        yield advance


# --- Stages of a longer job ---


def run_stage(folder: str | Path, manifest: Mapping[str, Any], action: Callable[[], Any]) -> bool:
    """Do `action` unless it was finished under the same manifest; True when it was done now.

    The manifest is written before (so that a killed stage goes on under the same settings alone) and after (so that a
    stage counts as done only when it is). `action` must go on where it was stopped.

    Raises UserError: the folder holds a stage, finished or started, with another manifest; what changed is listed.
    """
    folder = Path(folder)
    done = folder / STAGE_DONE
    finished = done.is_file()
    keep_manifest(
        done if finished else folder / STAGE_STARTED,
        manifest,
        "made with other settings or files",
        "Nothing was changed. Choose another output_dir; or go back to the old settings; or delete this folder and those "
        "of later rounds to make them anew.",
    )
    if not finished:
        action()
        write_json(done, manifest)
    return not finished


class Stages:
    """The stages of one folder in `stages.json`: each is done once, by the code that is here now, and its time is known
    whatever interrupts it.

    Args:
        folder: of the job.
        keep_stale: go on with results that other code made, and say so, instead of stopping.

    Attributes:
        seconds: time of each stage, all attempts added up.
        stale: stages whose results other code made.
    """

    def __init__(self, folder: str | Path, console: Console, *, keep_stale: bool = False):
        self.folder, self.console, self.keep_stale = Path(folder), console, keep_stale
        self._lock = Lock(folder)  # held as long as these stages are in use
        self.path = self.folder / "stages.json"
        self.stale: list[str] = []
        self._writing = threading.Lock()
        cure = "Remove this file to make the stages anew."
        records = read_object(self.path, Map(STAGE), cure) if self.path.exists() else {}
        self._records = {
            n: r if isinstance(r, dict) else {"seconds": r, "done": True} for n, r in records.items()
        }

    @property
    def seconds(self) -> dict[str, float]:
        return {name: record["seconds"] for name, record in self._records.items()}

    def run(self, name: str, action: Callable[[], object], uses: Sequence[str | Path]) -> None:
        """Run `action` unless it was finished before.

        Args:
            uses: files and folders that the result depends on; text is relative to the package.

        Raises UserError: it was started or finished by other code than is here now, and stale results are not to be kept.
        """
        now, record = fingerprints(uses), self._records.get(name)
        if record is not None and record.get("made_by") != now:
            self._report_stale(name, record, now)
        if record is not None and record["done"]:
            self.console.print(f"[dim]{name}: done before[/]")
            return
        self.console.rule(f"[bold]{name}", align="left")
        record = record or {"seconds": 0.0, "done": False, "version": __version__, "made_by": now}
        with self._timed(name, record):
            action()
        self._write(name, self._records[name] | {"done": True})

    def _report_stale(self, name: str, record: dict, now: dict[str, str]) -> None:
        maker = record.get("made_by")
        if maker is None:
            changed = "an unknown version"
        else:
            parts = sorted(part for part in {*maker, *now} if maker.get(part) != now.get(part))
            changed = f"version {record['version']} with another {', '.join(parts)}"
        words = f'{self.path}: the stage "{name}" was made by {changed}; this is version {__version__}.'
        if not self.keep_stale:
            raise UserError(
                f"{words} Its results and those of later stages may no longer be what this code gives. Choose another "
                "--output-dir or delete the folder to make them anew, or go on with them: `demo NAME --keep-stale`."
            )
        self.stale.append(name)
        self.console.print(f"[yellow]{words} Kept as it is.[/]")

    @contextmanager
    def _timed(self, name: str, record: dict) -> Iterator[None]:
        """Write the seconds of the stage every few seconds, so that a kill loses no more than those."""
        started, ended = time.monotonic(), threading.Event()

        def note() -> None:
            seconds = record["seconds"] + time.monotonic() - started
            self._write(name, record | {"seconds": round(seconds, 1)})

        def beat() -> None:
            while not ended.wait(BEAT_SECONDS):
                note()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            note()

    def _write(self, name: str, record: dict) -> None:
        with self._writing:
            self._records[name] = record
            write_json(self.path, self._records)
